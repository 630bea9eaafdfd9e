from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from soteacher.errors import InputError
from soteacher.mixing import MixingConfig, draw_own_share, mix, mixed_labels
from soteacher.types import Mixture

MIXUP, CUTMIX = MixingConfig(name="mixup"), MixingConfig(name="cutmix")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 6, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    """Return images of one value each, its label: what came from where can be read off a pixel."""
    labels = torch.arange(count)
    return labels.float().view(-1, 1, 1, 1).expand(count, 3, height, width).clone(), labels


def test_mixup_is_the_weighted_mean_with_the_image_of_the_other_label() -> None:
    images, labels = torch.rand(6, 3, 4, 5, generator=generator(1)), torch.arange(6)
    mixed, mixture = mix(images, labels, MIXUP, generator())
    share = mixture.share[0].item()
    assert 0 < share < 1
    expected = share * images.numpy() + (1 - share) * images.numpy()[mixture.labels.numpy()]
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-6)
    assert sorted(mixture.labels.tolist()) == labels.tolist()  # every image is the other one of one image
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 7)])
def test_cutmix_pastes_one_rectangle_and_returns_the_exact_share_of_the_rest(height: int, width: int) -> None:
    images, labels = batch(4, height, width)
    for seed in range(60):
        mixed, mixture = mix(images, labels, CUTMIX, generator(seed))
        for row in range(4):
            foreign = (mixed[row, 0] != labels[row]).numpy()
            if mixture.labels[row] != labels[row]:
                assert mixture.share[row].item() == pytest.approx(1 - foreign.mean(), abs=1e-6)
                assert (mixed[row][:, foreign] == mixture.labels[row]).all()
                rows, columns = foreign.any(1).nonzero()[0], foreign.any(0).nonzero()[0]
                if len(rows):
                    assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
                assert len(rows) * len(columns) == foreign.sum()
            else:
                assert not foreign.any()
        assert len(mixture.share.unique()) == 1


def test_cutmix_shares_have_the_mean_of_all_rectangles() -> None:
    size, count = 4, 3000
    images, labels = torch.zeros(2, 1, size, size), torch.arange(2)
    source = generator(3)
    shares = torch.stack([mix(images, labels, CUTMIX, source)[1].share[0] for _ in range(count)])

    def covered(length: int, centre: int) -> int:
        return len([pixel for pixel in range(centre - length // 2, centre - length // 2 + length) if 0 <= pixel < size])

    grid = (np.arange(20000) + 0.5) / 20000  # alpha 1: the share is even
    areas = []
    for length in range(size + 1):
        likely = (np.round(size * np.sqrt(1 - grid)) == length).mean()
        pasted = [covered(length, y) * covered(length, x) for y, x in product(range(size), repeat=2)]
        areas.append(likely * np.mean(pasted) / size**2)
    assert shares.mean().item() == pytest.approx(1 - sum(areas), abs=4 * shares.std().item() / count**0.5)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    source = generator()
    shares = np.array([draw_own_share(alpha, source) for _ in range(2000)])
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    mean, variance = stats.beta.stats(alpha, alpha, moments="mv")
    assert shares.mean() == pytest.approx(mean, abs=4 * (variance / 2000) ** 0.5)
    assert shares.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("alpha", [1e-3, 1e6])
def test_shares_of_extreme_parameters_are_shares(alpha: float) -> None:
    source = generator()
    assert all(0 <= draw_own_share(alpha, source) <= 1 for _ in range(50))


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=lambda config: config.name)
def test_mix_follows_from_the_generator_and_leaves_the_images(config: MixingConfig) -> None:
    images, labels = batch()
    before = images.clone()
    first, second = (mix(images, labels, config, generator(5)) for _ in range(2))
    other = mix(images, labels, config, generator(6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].labels, second[1].labels)
    assert torch.equal(first[1].share, second[1].share)
    assert not torch.equal(first[1].share, other[1].share)
    assert torch.equal(images, before)
    assert first[1].share.dtype == torch.float32


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=lambda config: config.name)
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_of_one_stays_as_it_is(config: MixingConfig, count: int) -> None:
    images, labels = batch(count)
    mixed, mixture = mix(images, labels, config, generator())
    assert torch.equal(mixed, images)
    assert torch.equal(mixture.labels, labels)
    assert mixture.share.tolist() == [1.0] * count


def test_batches_are_blended_as_often_as_wanted() -> None:
    config = MixingConfig(name="mixup", probability=0.3)
    images, labels = batch(2, 1, 1)
    source = generator()
    mixtures = [mix(images, labels, config, source)[1] for _ in range(1000)]
    whole = [mixture for mixture in mixtures if mixture.share[0] == 1]
    assert 1 - len(whole) / 1000 == pytest.approx(0.3, abs=0.06)
    assert all(torch.equal(mixture.labels, labels) for mixture in whole)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_mix_refuses_what_is_no_batch(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(InputError, match=r"mixing needs images \[B, C, H, W\] of floats and labels \[B\], got \[2, 3"):
        mix(images, labels, MIXUP, generator())


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cutout"}, {"name": "mixup", "alpha": 0.0}, {"name": "mixup", "probability": 0.0},
        {"name": "mixup", "probability": 1.5}, {"alpha": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_config_refuses_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MixingConfig.model_validate(settings)


def test_mixed_labels_by_hand() -> None:
    mixture = Mixture(labels=torch.tensor([2, 1]), share=torch.tensor([0.75, 0.25]))
    labels = torch.tensor([0, 1])
    assert mixed_labels(labels, mixture, num_classes=3).tolist() == [[0.75, 0, 0.25], [0, 1, 0]]
    assert mixed_labels(labels, None, num_classes=3).tolist() == [[1, 0, 0], [0, 1, 0]]
