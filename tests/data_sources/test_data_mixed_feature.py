import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from soteacher.data import DataConfig, MixedFeatureConfig, TrainLoader, load_data
from soteacher.data.augment import AugmentConfig, flip
from soteacher.data.mixed_feature import (
    BLOCK,
    NUM_TEXTURES,
    draw_features,
    draw_labels,
    make_features,
    normalized_geometric_mean,
)
from soteacher.errors import InputError
from soteacher.settings import parse

BOTH = pytest.mark.parametrize("rendering", ["vectors", "textures"])


def _load(**settings):
    return load_data(MixedFeatureConfig(**settings), Path())


def _patches(images: torch.Tensor, config: MixedFeatureConfig) -> torch.Tensor:
    """Cut images into patches, row by row: ``[N, M, C, P, P]``."""
    grid = images.unflatten(3, (config.grid, config.side)).unflatten(2, (config.grid, config.side))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _nearest(patches: torch.Tensor, config: MixedFeatureConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for every patch, the feature of the nearest rendering without noise, and the distance to it."""
    renderings = make_features(config).renderings
    distances = torch.cdist(patches.flatten(0, 1).flatten(1), renderings.flatten(0, 1).flatten(1))
    least = distances.min(1)
    return (least.indices // renderings.shape[1]).view(patches.shape[:2]), least.values


def test_geometric_mean_by_hand():
    distributions = torch.tensor([[0.5, 0.4, 0.1], [0.02, 0.9, 0.08]], dtype=torch.float64)
    roots = np.sqrt([0.5 * 0.02, 0.4 * 0.9, 0.1 * 0.08])
    expected = torch.from_numpy(roots / roots.sum())
    torch.testing.assert_close(normalized_geometric_mean(distributions), expected, rtol=1e-14, atol=0)


def test_geometric_mean_agrees_with_scipy():
    distributions = np.random.default_rng(0).dirichlet(np.ones(5), size=(7, 4))
    means = stats.gmean(distributions, axis=1)
    found = normalized_geometric_mean(torch.from_numpy(distributions)).numpy()
    np.testing.assert_allclose(found, means / means.sum(1, keepdims=True), rtol=1e-12)


def test_geometric_mean_of_equals_is_what_they_are_and_order_is_nothing():
    distributions = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distributions /= distributions.sum(1, keepdim=True)
    torch.testing.assert_close(normalized_geometric_mean(distributions[:1].expand(9, -1)), distributions[0])
    torch.testing.assert_close(
        normalized_geometric_mean(distributions), normalized_geometric_mean(distributions.flip(0))
    )


def test_geometric_mean_does_not_underflow():
    tiny = torch.tensor([1 - 1e-300, 1e-300], dtype=torch.float64)
    distributions = torch.stack((tiny, tiny.flip(0))).repeat(20, 1)
    torch.testing.assert_close(normalized_geometric_mean(distributions), torch.full((2,), 0.5, dtype=torch.float64))


def test_a_class_that_one_distribution_excludes_is_excluded():
    distributions = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(normalized_geometric_mean(distributions), torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("distributions", "words"),
    [
        (torch.eye(2), "the geometric mean is 0"),
        (torch.tensor([[0.5, 0.6]]), "sum 1"),
        (torch.tensor([[1.5, -0.5]]), "not negative"),
        (torch.tensor([[float("nan"), 0.5]]), "not negative"),
        (torch.tensor([0.5, 0.5]), r"\[\.\.\., M, K\] in floating point, got torch.float32 \[2\]"),
        (torch.tensor([[1, 0]]), r"got torch.int64 \[1, 2\]"),
        (torch.rand(3, 0, 2), r"got torch.float32 \[3, 0, 2\]"),
    ],
)
def test_what_has_no_geometric_mean_is_refused(distributions, words):
    with pytest.raises(InputError, match=words) as caught:
        normalized_geometric_mean(distributions)
    assert "\n" not in str(caught.value)


def test_labels_follow_their_distributions_and_zeros_are_never_drawn():
    distribution = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    labels = draw_labels(distribution.expand(20_000, -1), torch.Generator().manual_seed(0))
    counts = np.bincount(labels.numpy(), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    assert stats.chisquare(counts[[1, 3, 4]], 20_000 * np.array([0.6, 0.3, 0.1])).pvalue > 1e-3


@BOTH
def test_true_distribution_is_that_of_the_shown_features(rendering):
    config = MixedFeatureConfig(rendering=rendering, train_examples=40, test_examples=30, num_patches=9, seed=3)
    data = config.load(Path())
    by_feature = make_features(config).log_distributions.exp()
    torch.testing.assert_close(by_feature.sum(1), torch.ones(16, dtype=torch.float64))
    for split, name in ((data.train, "train"), (data.test, "test")):
        expected = normalized_geometric_mean(by_feature[draw_features(config, name)])
        torch.testing.assert_close(split.label_distribution, expected.float(), rtol=1e-5, atol=1e-12)
        assert torch.equal(split.clean_labels, expected.argmax(1))
        assert split.label_distribution.dtype == torch.float32
        assert split.labels.dtype == split.clean_labels.dtype == torch.int64


def test_true_distribution_is_how_labels_come_out_in_many_draws():
    config = MixedFeatureConfig(
        num_features=3, num_classes=4, num_patches=4, patch_size=1, concentration=0.7, train_examples=30_000,
        test_examples=1, seed=1,
    )  # fmt: skip
    train = config.load(Path()).train
    shown = draw_features(config, "train").sort(1).values
    groups, group_of = shown.unique(dim=0, return_inverse=True)
    assert len(groups) == 15  # ways to choose 4 of 3 with repetition
    pvalues = []
    for group in range(len(groups)):
        rows = (group_of == group).nonzero().squeeze(1)
        true = train.label_distribution[rows[0]].double().numpy()
        np.testing.assert_allclose(train.label_distribution[rows].numpy(), np.tile(true, (len(rows), 1)), rtol=1e-6)
        counts = np.bincount(train.labels[rows].numpy(), minlength=4)
        likely = true * len(rows) >= 5  # as the chi-square approximation wants it; the others count as one class
        observed = np.append(counts[likely], counts[~likely].sum())
        expected = np.append(true[likely], true[~likely].sum()) * len(rows)
        kept = expected > 1
        pvalues.append(
            stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue
        )
    assert min(pvalues) > 1e-3 / len(groups)
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def test_likelihood_of_the_true_distribution_is_its_entropy():
    data = _load(train_examples=20_000, num_patches=1, patch_size=1, test_examples=1, concentration=0.5)
    log = data.train.label_distribution.double().clamp(min=1e-300).log()
    surprise = -log.gather(1, data.train.labels[:, None]).squeeze(1)
    entropy = -(log * log.exp()).sum(1)
    excess = surprise - entropy
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5


def test_features_are_drawn_uniformly_and_independently():
    config = MixedFeatureConfig(num_features=5, num_patches=4, train_examples=5000)
    shown = draw_features(config, "train").numpy()
    assert shown.shape == (5000, 4)
    for place in range(4):
        assert stats.chisquare(np.bincount(shown[:, place], minlength=5)).pvalue > 1e-3
    for first, second in itertools.combinations(range(4), 2):
        table = np.zeros((5, 5))
        np.add.at(table, (shown[:, first], shown[:, second]), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3
    assert not np.array_equal(shown, draw_features(config.model_copy(update={"test_examples": 5000}), "test").numpy())


@pytest.mark.parametrize("concentration", [0.02, 0.3, 2.0])
def test_label_distributions_are_draws_from_the_dirichlet_distribution(concentration):
    config = MixedFeatureConfig(num_features=4000, num_classes=5, concentration=concentration)
    log = make_features(config).log_distributions
    assert log.isfinite().all()
    one_class = stats.beta(concentration, 4 * concentration)  # each share of it is distributed so
    shares = log.exp()[:, 2].numpy()
    seen = shares[shares > 1e-12]  # below, the distribution function itself loses its digits
    assert len(seen) / len(shares) == pytest.approx(one_class.sf(1e-12), abs=0.03)
    conditional = (one_class.cdf(seen) - one_class.cdf(1e-12)) / one_class.sf(1e-12)
    assert stats.kstest(conditional, "uniform").pvalue > 1e-3


@BOTH
def test_noise_is_gaussian_with_the_set_deviation(rendering):
    settings = {"rendering": rendering, "train_examples": 300, "test_examples": 1}
    clean, noisy = _load(noise=0, **settings), _load(noise=0.03, **settings)
    difference = (noisy.train.images - clean.train.images)[(clean.train.images > 0.2) & (clean.train.images < 0.8)]
    assert stats.kstest(difference[:20_000].numpy() / 0.03, "norm").pvalue > 1e-3
    assert difference.std().item() == pytest.approx(0.03, rel=0.02)
    assert torch.equal(noisy.train.labels, clean.train.labels)
    assert torch.equal(noisy.train.label_distribution, clean.train.label_distribution)
    assert noisy.mean == clean.mean
    assert noisy.std == clean.std


def test_images_are_clipped():
    images = _load(noise=1, train_examples=50).train.images
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0, 1)


@pytest.mark.parametrize(
    ("rendering", "num_features", "noise"),
    [("vectors", 16, 0.0), ("vectors", 16, 0.03), ("textures", 60, 0.0), ("textures", 60, 0.03)],
)
def test_nearest_rendering_gives_the_shown_feature(rendering, num_features, noise):
    config = MixedFeatureConfig(rendering=rendering, num_features=num_features, noise=noise, train_examples=100)
    found, distance = _nearest(_patches(config.load(Path()).train.images, config), config)
    assert torch.equal(found, draw_features(config, "train"))
    if noise == 0:
        assert distance.max() < 1e-2  # of cdist's rounding


@BOTH
def test_every_transformation_is_used_equally_often(rendering):
    config = MixedFeatureConfig(rendering=rendering, num_features=2, noise=0, train_examples=500, num_patches=16)
    patches = _patches(config.load(Path()).train.images, config).flatten(0, 1)
    renderings = make_features(config).renderings
    keys = [patch.numpy().tobytes() for patch in renderings.flatten(0, 1)]
    expected = Counter(keys)  # symmetric features look the same under several transformations
    counts = Counter(patch.numpy().tobytes() for patch in patches)
    assert set(counts) <= set(expected)
    shares = np.array([expected[key] for key in expected]) / len(keys)
    observed = np.array([counts[key] for key in expected])
    assert stats.chisquare(observed, shares * len(patches)).pvalue > 1e-3


@BOTH
def test_mirrored_renderings_are_renderings_of_the_same_feature(rendering):
    renderings = make_features(MixedFeatureConfig(rendering=rendering)).renderings
    assert renderings.shape[1] == (8 if rendering == "vectors" else 96)
    for own in renderings:
        keys = {patch.numpy().tobytes() for patch in own}
        for changed in (own.flip(-1), own.flip(-2), own.rot90(1, (-2, -1))):
            assert {patch.contiguous().numpy().tobytes() for patch in changed} == keys


def test_the_loaders_mirroring_keeps_the_features():
    config = MixedFeatureConfig(noise=0, train_examples=50)
    images = flip(config.load(Path()).train.images, torch.ones(50, dtype=torch.bool))
    found, _ = _nearest(_patches(images, config), config)
    shown = draw_features(config, "train")
    assert torch.equal(found.view(50, 2, 2), shown.view(50, 2, 2).flip(-1))
    log = make_features(config).log_distributions
    torch.testing.assert_close(log[found].mean(1).softmax(1), log[shown].mean(1).softmax(1))


@BOTH
def test_more_examples_begin_with_fewer(rendering):
    few = _load(rendering=rendering, train_examples=BLOCK - 7, test_examples=3)
    many = _load(rendering=rendering, train_examples=2 * BLOCK + 1, test_examples=BLOCK)
    for less, more in ((few.train, many.train), (few.test, many.test)):
        rows = slice(less.num_examples)
        assert torch.equal(less.images, more.images[rows])
        assert torch.equal(less.labels, more.labels[rows])
        assert torch.equal(less.label_distribution, more.label_distribution[rows])
    assert not torch.equal(many.train.images[:BLOCK], many.test.images)
    assert not torch.equal(many.train.images[:BLOCK], many.train.images[BLOCK : 2 * BLOCK])
    assert few.mean == many.mean


def test_same_settings_same_data():
    settings = {"train_examples": 60, "test_examples": 20}
    data = _load(**settings)
    assert _load(**settings).checksum == data.checksum
    assert _load(**settings, seed=1).checksum != data.checksum
    torch.manual_seed(7)  # nothing comes from the global generator
    assert _load(**settings).checksum == data.checksum


def test_concentration_changes_no_image():
    assert torch.equal(_load(concentration=0.1).train.images, _load(concentration=1).train.images)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (1, 8, 8)),
        ({"num_patches": 9}, (1, 12, 12)),
        ({"num_patches": 1, "patch_size": 3}, (1, 3, 3)),
        ({"rendering": "textures"}, (3, 32, 32)),
        ({"rendering": "textures", "num_patches": 4, "patch_size": 10}, (3, 20, 20)),
    ],
)
def test_sizes(settings, shape):
    data = _load(train_examples=40, test_examples=5, **settings)
    assert (data.train.image_shape, data.train.num_examples, data.test.num_examples) == (shape, 40, 5)
    assert (data.name, data.num_classes, data.class_names[-1]) == ("mixed_feature", 10, "9")
    assert data.test.label_distribution.shape == (5, 10)


def test_normalisation_is_of_patches_without_noise():
    data = _load(noise=0, rendering="textures", train_examples=4000, test_examples=1, num_patches=1)
    assert data.mean == pytest.approx(data.train.images.mean((0, 2, 3)).tolist(), abs=0.01)
    assert data.std == pytest.approx(data.train.images.transpose(0, 1).flatten(1).std(1).tolist(), abs=0.01)


def test_it_is_read_as_a_study_reads_it_and_comes_in_batches():
    tree = {"source": "mixed_feature", "train_examples": 50, "augment": {"crop_padding": 0}, "noise": 0.1}
    config = TypeAdapter(DataConfig).validate_python(tree)
    assert isinstance(config, MixedFeatureConfig)
    assert config.augment.horizontal_flip
    data = load_data(config, Path())
    loader = TrainLoader(data.train, batch_size=32, augment=config.augment, seed=0, device="cpu")
    batches = list(loader.epoch(0))
    assert [len(batch.images) for batch in batches] == [32, 18]
    for batch in batches:
        originals = data.train.images[batch.indices]
        kept = (batch.images == originals).flatten(1).all(1)
        assert torch.equal(batch.images[~kept], originals.flip(-1)[~kept])
        assert torch.equal(batch.labels, data.train.labels[batch.indices])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_patches": 5}, "data.num_patches: wanted a square number such as 4, 9 or 16, got 5"),
        ({"num_patches": 0}, "data.num_patches: .*greater than 0, got 0"),
        ({"noise": -0.1}, "data.noise: .*greater than or equal to 0, got -0.1"),
        ({"num_features": 1}, "data.num_features: .*greater than or equal to 2, got 1"),
        ({"num_classes": 1}, "data.num_classes: .*greater than or equal to 2, got 1"),
        ({"concentration": 0}, "data.concentration: .*greater than 0, got 0"),
        ({"concentration": "high"}, "data.concentration: wanted a number, got 'high'"),
        ({"seed": -1}, "data.seed: .*greater than or equal to 0, got -1"),
        ({"train_examples": None}, "data.train_examples: wanted a number of examples to make, got null"),
        ({"test_examples": 0}, "data.test_examples: .*greater than 0, got 0"),
        ({"rendering": "words"}, "data.rendering: .*'vectors' or 'textures', got 'words'"),
        ({"augment": {}}, "data: augment.crop_padding is 4; wanted 0, as a crop cuts patches"),
        (
            {"augment": {"crop_padding": 0, "random_resized_crop": [0.5, 1.0]}},
            "data: augment.random_resized_crop is set; wanted null, as a crop cuts patches",
        ),
        (
            {"rendering": "textures", "num_features": NUM_TEXTURES + 1},
            "data: num_features is 61; wanted at most 60 of textures",
        ),
        ({"rendering": "textures", "patch_size": 4}, "data: patch_size is 4; wanted at least 8 of textures"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, line):
    with pytest.raises(InputError, match=f"^{line}$"):
        parse(MixedFeatureConfig, settings, place="data")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "mean has 3 values; images of mixed_feature have 1 channels"),
        ({"rendering": "textures", "std": (0.5,)}, "std has 1 values; images of mixed_feature have 3 channels"),
        ({"train_examples": 1}, "the training images of mixed_feature are of one class only"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        _load(**settings)


def test_settings_are_frozen_and_read_back_equal():
    config = MixedFeatureConfig(num_patches=9, augment=AugmentConfig(crop_padding=0, horizontal_flip=False))
    assert MixedFeatureConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.noise = 1
