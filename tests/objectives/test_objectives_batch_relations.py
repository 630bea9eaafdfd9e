"""Relations of the images of a batch: similarity, correlation, RKD's distances and angles, PKT's neighbours."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.spatial.distance import pdist, squareform
from scipy.special import rel_entr
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.correlation import CorrelationConfig, correlation_distance
from soteacher.objectives.student.pkt import neighbour_divergence, neighbour_probabilities
from soteacher.objectives.student.rkd import RKDConfig, relational_distance, relative_distances, triplet_angles
from soteacher.objectives.student.similarity import batch_similarity, similarity_distance
from soteacher.types import NetworkFacts, Task

Distance = Callable[[Tensor, Tensor], Tensor]


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return relational_distance(student, teacher, distance_weight=25.0, angle_weight=50.0)


@pytest.fixture
def embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
        torch.randn(5, 4, generator=generator, dtype=torch.float64),
    )


@pytest.fixture
def rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double())[0]


def test_batch_similarity_by_hand() -> None:
    found = batch_similarity(torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]], [[0.0], [0.0]]]))
    expected = torch.tensor([[5.0, 4.0, 0.0], [4.0, 5.0, 0.0], [0.0, 0.0, 0.0]]) / 41**0.5
    torch.testing.assert_close(found, expected)


def test_similarity_distance_equals_numpy(embeddings: tuple[Tensor, Tensor]) -> None:
    grams = [side.numpy() @ side.numpy().T for side in embeddings]
    rows = [gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in grams]
    expected = torch.tensor(((rows[0] - rows[1]) ** 2).sum() / 25)
    torch.testing.assert_close(similarity_distance(*embeddings), expected)


def test_correlation_distance_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 5.0]])  # errors (1, 2), (2, 0), (3, 5)
    torch.testing.assert_close(correlation_distance(student, teacher), torch.tensor((2.0 + 6.0) / 2))
    assert correlation_distance(student[:1], teacher[:1]) == 0


def test_correlation_distance_trains_both_embeddings(embeddings: tuple[Tensor, Tensor]) -> None:
    inputs = (embeddings[0].requires_grad_(), embeddings[1][:, :3].clone().requires_grad_())
    assert torch.autograd.gradcheck(correlation_distance, inputs)
    with pytest.raises(InputError, match=r"one shape \[B, D\], got \[5, 3\] \(student\) and \[5, 4\] \(teacher\)"):
        correlation_distance(*embeddings)


def test_correlation_embeds_both_sides_in_the_dimension_of_its_settings() -> None:
    student = NetworkFacts(name="student", taps={"pooled": (6,)}, num_logits=5)
    teacher = NetworkFacts(name="teacher", taps={"pooled": (9,)}, num_logits=5)
    task = Task(num_examples=4, num_classes=5, network=student, teacher=teacher)
    shapes = {name: tuple(value.shape) for name, value in CorrelationConfig().build(task).named_parameters()}
    assert shapes["student_embeddings.0.weight"] == (128, 6)
    assert shapes["teacher_embeddings.0.weight"] == (128, 9)
    with pytest.raises(ValidationError):
        CorrelationConfig(dimension=0)


def test_relative_distances_equal_scipy(embeddings: tuple[Tensor, Tensor]) -> None:
    distances = pdist(embeddings[0].numpy())
    expected = torch.from_numpy(squareform(distances / distances.mean()))
    torch.testing.assert_close(relative_distances(embeddings[0]), expected)


def test_relative_distances_leave_equal_examples_out_of_the_mean() -> None:
    found = relative_distances(torch.tensor([[0.0], [0.0], [3.0]]))  # the mean of 3 and 3
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]]))
    assert not relative_distances(torch.ones(3, 2)).any()


def test_triplet_angles_by_hand() -> None:
    angles = triplet_angles(torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 3.0]]))
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.5**0.5], [0.0, 0.5**0.5, 1.0]])  # seen from the first one
    torch.testing.assert_close(angles[0], expected)


def test_triplet_angles_equal_a_loop(embeddings: tuple[Tensor, Tensor]) -> None:
    points, found = embeddings[1].numpy(), triplet_angles(embeddings[1]).numpy()
    for i, j, k in np.ndindex(5, 5, 5):
        first, second = points[j] - points[i], points[k] - points[i]
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        expected = first @ second / lengths if lengths > 0 else 0.0
        assert found[i, j, k] == pytest.approx(expected, abs=1e-12)


def test_triplet_angles_are_exact_for_examples_close_by() -> None:
    points = torch.tensor([[1.0, 1.0], [1.0 + 2**-12, 1.0], [1.0, 1.0 + 2**-12], [-100.0, 30.0]])
    assert triplet_angles(points)[0, 1, 2] == 0
    differences = (points[None] - points[:, None]).double()
    expected = torch.nn.functional.cosine_similarity(differences[:, :, None], differences[:, None], dim=3)
    torch.testing.assert_close(triplet_angles(points), expected.float(), rtol=1e-5, atol=1e-6)


def test_relational_distance_weighs_its_two_parts(embeddings: tuple[Tensor, Tensor]) -> None:
    def huber(difference: Tensor) -> float:
        size = np.abs(difference.numpy())
        return float(np.where(size < 1, size**2 / 2, size - 0.5).mean())

    distances = 2 * huber(relative_distances(embeddings[0]) - relative_distances(embeddings[1]))
    angles = 3 * huber(triplet_angles(embeddings[0]) - triplet_angles(embeddings[1]))
    for weights, expected in (((2, 0), distances), ((0, 3), angles), ((2, 3), distances + angles)):
        found = relational_distance(*embeddings, distance_weight=weights[0], angle_weight=weights[1])
        assert found.item() == pytest.approx(expected)


def test_relational_distance_has_finite_gradients_for_equal_embeddings() -> None:
    student = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    student[1] = student[0]
    student[2] = student[0] + 1e-7
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(rkd(student, torch.randn(6, 4)), student)
    assert gradient.isfinite().all()


def test_relational_distance_refuses_weights(embeddings: tuple[Tensor, Tensor]) -> None:
    for weights in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(InputError, match=r"weights must be 0 or more, one of them more"):
            relational_distance(*embeddings, distance_weight=weights[0], angle_weight=weights[1])
    with pytest.raises(ValidationError, match="nothing would be compared"):
        RKDConfig(distance_weight=0.0, angle_weight=0.0)
    with pytest.raises(ValidationError):
        RKDConfig(angle_weight=-1.0)


def test_neighbour_probabilities_by_hand() -> None:
    found = neighbour_probabilities(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))  # cosines 0 and -1
    expected = torch.tensor([[2 / 3, 1 / 3, 0.0], [0.25, 0.5, 0.25], [0.0, 1 / 3, 2 / 3]])
    torch.testing.assert_close(found, expected)


def test_neighbour_divergence_is_a_divergence(embeddings: tuple[Tensor, Tensor]) -> None:
    student, teacher = (neighbour_probabilities(side).numpy() for side in embeddings)
    expected = rel_entr(teacher, student).sum() / 25
    torch.testing.assert_close(neighbour_divergence(*embeddings), torch.tensor(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", [similarity_distance, rkd, neighbour_divergence])
def test_relations_ignore_rotations_factors_and_the_order(
    distance: Distance, embeddings: tuple[Tensor, Tensor], rotation: Tensor
) -> None:
    student, teacher = embeddings
    expected = distance(student, teacher)
    assert expected > 0
    torch.testing.assert_close(distance(3 * student @ rotation, 0.1 * teacher), expected)
    torch.testing.assert_close(distance(student.flip(0), teacher.flip(0)), expected)
    zero = distance(student, student @ rotation)
    torch.testing.assert_close(zero, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("distance", [similarity_distance, rkd, neighbour_divergence])
def test_gradients_reach_the_student_only(distance: Distance, embeddings: tuple[Tensor, Tensor]) -> None:
    student, teacher = (side.requires_grad_() for side in embeddings)
    assert torch.autograd.gradcheck(lambda x: distance(x, teacher.detach()), student)
    distance(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("distance", [rkd, neighbour_divergence])
def test_relations_of_embeddings_refuse_shapes(distance: Distance) -> None:
    with pytest.raises(
        InputError, match=r"must be \[B, D\] with one B, got \[2, 3\] \(student\) and \[3, 3\] \(teacher\)"
    ):
        distance(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="with one B"):
        distance(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3))


def test_similarity_distance_refuses_other_examples() -> None:
    with pytest.raises(InputError, match=r"\[B, ...\] with one B, got \[2, 3\] \(student\) and \[3, 3\] \(teacher\)"):
        similarity_distance(torch.zeros(2, 3), torch.zeros(3, 3))
