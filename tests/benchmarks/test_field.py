import pytest
import torch
from benchmarks.field import FieldImages, FieldStudent, FieldTeacher, draws_of_torchvision, field_loader
from benchmarks.field import soteacher_regularizers as field_terms
from benchmarks.field_losses import kd
from benchmarks.ours import assembled, batches, data_of, frozen_teacher, study_of, trainee_of

from soteacher.data import AugmentConfig, ImageSplit
from soteacher.data.augment import apply_views
from soteacher.errors import InputError
from soteacher.train.loop import train_step

MEAN, STD = (0.5,) * 3, (0.25,) * 3
EXAMPLES, BATCH, STEPS = 24, 8, 5
"""So few images that the later steps see examples a second time."""


@pytest.fixture(scope="module")
def study():
    return study_of(
        data_of(examples=EXAMPLES),
        teachers={"soteacher": {"model": "resnet8", "method": "soteacher"}},
        students={"kd": {"model": "resnet8", "method": "kd"}},
        training={"batch_size": BATCH, "epochs": 4, "channels_last": False, "compile": False},
    )


def _first_batches(study):
    source = batches(study)
    return [next(source) for _ in range(STEPS)]


def _normalized(images):
    return (images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def _our_losses(trainee, taken):
    return [train_step(trainee, batch, epoch=1, progress=0.3)[0].sum().item() for batch in taken]


def _field_losses(field, taken):
    return [field.step(_normalized(batch.images), batch.labels, batch.indices) for batch in taken]


def test_the_field_s_teacher_has_the_losses_of_ours(study):
    made, taken = assembled(study, "teacher", "soteacher"), _first_batches(study)
    network = assembled(study, "teacher", "soteacher").classifier.network
    field = FieldTeacher(network, field_terms(EXAMPLES, study.data.num_classes, ramp=2 / 4))
    wanted = _our_losses(trainee_of(study, "teacher", "soteacher", made), taken)
    assert _field_losses(field, taken) == pytest.approx(wanted, rel=1e-4)
    assert made.terms["consistency"].objective.count.max() == 2  # the memory has been in use


def test_without_regularizers_it_is_cross_entropy(study):
    network = assembled(study, "teacher", "soteacher").classifier.network
    batch = _first_batches(study)[0]
    images = _normalized(batch.images)
    wanted = torch.nn.functional.cross_entropy(network.train()(images), batch.labels).item()
    assert FieldTeacher(network).step(images, batch.labels, batch.indices) == pytest.approx(wanted, rel=1e-5)


def test_the_field_s_student_has_the_losses_of_ours(study):
    made, taken = assembled(study, "student", "kd"), _first_batches(study)
    field = FieldStudent(
        assembled(study, "student", "kd").classifier.network,
        frozen_teacher(study).network,
        lambda own, other, *_: kd(own.logits, other.logits, temperature=4.0),
        label_weight=made.terms["cross_entropy"].weight,
        distillation_weight=made.terms["kd"].weight,
    )
    wanted = _our_losses(trainee_of(study, "student", "kd", made), taken)
    assert _field_losses(field, taken) == pytest.approx(wanted, rel=1e-4)


def test_the_field_s_student_gives_features_and_trains_the_criterion(study):
    class Regressor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(64, 64, 1)

        def forward(self, own, other, labels, indices):
            assert not other.features["stage3"].requires_grad
            assert labels.shape == indices.shape == own.features["pooled"].shape[:1]
            return (self.layer(own.features["stage3"]) - other.features["stage3"]).square().mean()

    criterion = Regressor()
    before = criterion.layer.weight.detach().clone()
    field = FieldStudent(
        assembled(study, "student", "kd").classifier.network, frozen_teacher(study).network, criterion,
        label_weight=0.5, distillation_weight=2.0, features=["stage3", "pooled"], teacher_features=["stage3"],
    )  # fmt: skip
    batch = _first_batches(study)[0]
    field.step(_normalized(batch.images), batch.labels, batch.indices)
    assert not torch.equal(criterion.layer.weight, before)
    assert field.student.training
    assert not field.teacher.training


def test_the_field_s_images_are_ours_at_the_same_draws(study):
    split = study.data.train
    dataset = FieldImages(split, (0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(5)
    images, labels, indices = zip(*(dataset[index] for index in range(EXAMPLES)), strict=True)
    torch.manual_seed(5)
    views = draws_of_torchvision(EXAMPLES)
    assert torch.equal(torch.stack(images), apply_views(split.images, views, AugmentConfig()))
    assert list(labels) == split.labels.tolist()
    assert list(indices) == list(range(EXAMPLES))
    assert 0 < views.flips.sum() < EXAMPLES
    assert views.offsets.min() >= 0
    assert views.offsets.max() <= 8


def test_the_field_s_loader_normalises_and_shuffles(study):
    loader = field_loader(study.data.train, MEAN, STD, batch_size=BATCH, workers=0, seed=3)
    images, labels, indices = next(iter(loader))
    assert images.shape == (BATCH, 3, 32, 32)
    assert images.min() == pytest.approx(-2)  # black, of which there is some around the crops
    assert torch.equal(study.data.train.labels[indices], labels)
    assert indices.tolist() != sorted(indices.tolist())
    assert len(loader) == EXAMPLES // BATCH


@pytest.mark.parametrize(
    ("images", "words"),
    [(torch.zeros(2, 3, 32, 32), "uint8"), (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"\[1, 32, 32\]")],
)
def test_images_of_another_kind_are_refused(images, words):
    with pytest.raises(InputError, match=words):
        FieldImages(ImageSplit(images=images, labels=torch.zeros(2, dtype=torch.int64)), MEAN, STD)
