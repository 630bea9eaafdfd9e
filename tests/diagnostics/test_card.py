import base64
import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.data import AugmentConfig, DataSet, FolderConfig, ImageSplit
from soteacher.diagnostics.card import MOST_PASSES, CardConfig, make_card
from soteacher.diagnostics.look import sample_of
from soteacher.diagnostics.passes import _places_of_precision, measured
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier
from soteacher.report.card_tables import GROUPS

SAME = AugmentConfig(crop_padding=0, horizontal_flip=False)
FLIPS = AugmentConfig(crop_padding=1)


def data_of(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_classes: int = 3, **known: Any
) -> DataSet:
    splits = {name: ImageSplit(images=pair[0], labels=pair[1]) for name, pair in (("train", train), ("test", test))}
    splits["train"] = replace(splits["train"], **known)
    channels = train[0].shape[1]
    return DataSet(
        name="made", **splits, class_names=tuple("abcdefghij"[:num_classes]), mean=(0.0,) * channels,
        std=(1.0,) * channels, checksum="c0ffee",
    )  # fmt: skip


def random_data(num_train: int = 60, num_test: int = 30, *, size: int = 6, channels: int = 1, **known: Any) -> DataSet:
    source = torch.Generator().manual_seed(0)
    images = torch.rand(num_train + num_test, channels, size, size, generator=source)
    labels = torch.arange(num_train + num_test) % 3
    return data_of((images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:]), **known)


def card_of(network: nn.Module, data: DataSet, augment: AugmentConfig = FLIPS, **options: Any) -> dict[str, Any]:
    spec = NetworkSpec(
        model="made", num_classes=data.num_classes, in_channels=data.in_channels, mean=data.mean, std=data.std
    )
    classifier = network if isinstance(network, Classifier) else Classifier(network, mean=data.mean, std=data.std)
    out_of_fold = options.pop("out_of_fold", None)
    return make_card(classifier, spec, data, augment, CardConfig(**options), device="cpu", out_of_fold=out_of_fold)


class Encoded(nn.Module):
    """The upper left pixel is the probability of the second of two classes."""

    def forward(self, images: Tensor) -> Tensor:
        second = images[:, 0, 0, 0]
        return torch.stack((torch.log1p(-second), second.log()), dim=1)


class Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


class Linear(nn.Module):
    """A linear map of the pixels, with a slope that is known."""

    def __init__(self, pixels: int, num_classes: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, num_classes)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(num_classes, pixels, generator=torch.Generator().manual_seed(1)))
            self.layer.bias.copy_(torch.linspace(-1, 1, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


class Convolutional(nn.Module):
    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.convolution(images))).mean((2, 3)))


def test_a_perfectly_calibrated_network_has_no_error_and_no_distance() -> None:
    # Of ten images at 0.3 three are of the second class, of ten at 0.8 eight are.
    second = torch.tensor([0.3] * 10 + [0.8] * 10)
    images = second.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    labels = torch.tensor([1] * 3 + [0] * 7 + [1] * 8 + [0] * 2)
    truth = torch.stack((1 - second, second), dim=1)
    data = data_of((images, labels), (images, labels), num_classes=2, label_distribution=truth)
    card = card_of(Encoded(), data, SAME)
    entropy = np.mean([-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.3, 0.8)])
    for split in ("train", "test"):
        figures = card["figures"][split]
        assert figures["accuracy"] == pytest.approx(0.75)
        assert figures["confidence"] == pytest.approx(0.75, abs=1e-6)
        assert figures["ece"] == pytest.approx(0, abs=1e-6)
        assert figures["adaptive_ece"] < 0.3  # its bins cut through the groups
        assert figures["nll"] == pytest.approx(entropy, abs=1e-6)
        assert figures["entropy"] == pytest.approx(entropy, abs=1e-6)
        assert card["figures"]["temperature"][split] == pytest.approx(1, abs=1e-4)
    assert card["figures"]["distance"].keys() == {"train"}
    assert all(value == pytest.approx(0, abs=1e-6) for value in card["figures"]["distance"]["train"].values())
    assert not any("no true label distribution" in note for note in card["notes"])
    filled = [part for part in card["reliability"]["test"] if part["count"]]
    assert [part["accuracy"] for part in filled] == pytest.approx([part["confidence"] for part in filled], abs=1e-6)


def test_a_constant_network_has_no_slope_and_no_information() -> None:
    card = card_of(Constant([1.0, 0.0, -1.0]), random_data())
    figures, probabilities = card["figures"], np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    for split in ("train", "train_augmented", "test"):
        assert figures[split]["accuracy"] == pytest.approx(1 / 3)
        assert figures[split]["confidence"] == pytest.approx(probabilities[0], abs=1e-6)
        assert figures[split]["nll"] == pytest.approx(-np.log(probabilities).mean(), abs=1e-6)
        assert figures[split]["conditional_mutual_information"] == pytest.approx(0, abs=1e-6)
    assert figures["views"] == {"prediction_variance": 0, "feature_variance": 0, "true_class_stddev": 0}
    assert figures["lipschitz"]["input_gradient_mean"] == figures["lipschitz"]["largest_slope"] == 0
    assert figures["lipschitz"]["log10_product_1"] is None
    assert figures["weights"] == {"near_zero": None, "dead_channels": None}
    assert card["layers"] == []
    assert [note.split(":")[0] for note in card["notes"]] == [
        "the network has no linear layer to take features from; the features are its logits",
        "figures of predictions on augmented training images are those of one view of each",
        "no true label distribution is known for made; give --folds to compare with out-of-fold predictions",
        "no figures of weights", "no norms of layers", "slope",
    ]  # fmt: skip


def test_a_linear_network_has_the_slope_of_its_matrix() -> None:
    network, data = Linear(36), random_data()
    weight = network.layer.weight.detach().double().numpy()
    card = card_of(network, data, slope_steps=30)
    spectral = np.linalg.norm(weight, 2)
    lipschitz = card["figures"]["lipschitz"]
    assert 0.9 * spectral < lipschitz["largest_slope"] <= spectral * (1 + 1e-5)
    assert card["layers"] == [
        {
            "layer": "layer", "batch_norm": None, "norm_1": pytest.approx(np.abs(weight).sum(0).max()),
            "norm_2": pytest.approx(spectral),
        }
    ]  # fmt: skip
    assert lipschitz["log10_product_2"] == pytest.approx(math.log10(spectral))
    # By hand: the gradient of log p_y is the label's row of the matrix less the mean row under p.
    images, labels = data.train.images.flatten(1).double().numpy(), data.train.labels.numpy()
    logits = images @ weight.T + network.layer.bias.detach().double().numpy()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    norms = np.linalg.norm(weight[labels] - probabilities @ weight, axis=1)
    assert card["sampled"]["gradient"] == 60
    assert lipschitz["input_gradient_mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert lipschitz["input_gradient_95"] == pytest.approx(np.quantile(norms, 0.95), rel=1e-5)


def test_views_are_measured_against_what_the_augmentation_draws() -> None:
    """Flips alone give each image one of two predictions; the variance over views follows from how often each came."""
    data, network = random_data(), Linear(36)
    only_flips = AugmentConfig(crop_padding=0)
    card = card_of(network, data, only_flips, views=10)
    with torch.no_grad():
        plain, mirrored = (network(images).softmax(1) for images in (data.train.images, data.train.images.flip(-1)))
    # The unbiased variance of a choice between two values is a quarter of their squared distance in the mean.
    expected = ((plain - mirrored).square().sum(1) / 4).mean().item()
    assert card["figures"]["views"]["prediction_variance"] == pytest.approx(expected, rel=0.15)
    assert card["sampled"]["views"] == 10
    assert card["figures"]["train"]["nll"] != card["figures"]["train_augmented"]["nll"]


def test_an_augmentation_that_changes_nothing_leaves_the_views_out() -> None:
    card = card_of(Linear(36), random_data(), SAME)
    assert set(card["figures"]["views"].values()) == set(card["figures"]["train_augmented"].values()) == {None}
    assert card["figures"]["views"].keys() == card_of(Linear(36), random_data())["figures"]["views"].keys()
    assert card["figures"]["train_augmented"].keys() == card["figures"]["train"].keys()
    assert card["sampled"]["views"] == 0
    assert card["notes"][0].startswith("the augmentation changes nothing")


def test_a_card_holds_what_the_contract_says() -> None:
    data = random_data(label_distribution=torch.full((60, 3), 1 / 3))
    card = json.loads(json.dumps(card_of(Convolutional(), data, most_different=4), allow_nan=False))
    assert card.keys() == {
        "schema", "soteacher_version", "network", "data", "sampled", "figures", "layers", "reliability",
        "confidence_histogram", "most_different", "seconds", "passes", "notes",
    }  # fmt: skip
    assert card["schema"] == 1
    assert card["sampled"] == {"train": 60, "test": 30, "views": 6, "gradient": 60, "slope": 17, "seed": 0}
    assert card["seconds"].keys() == GROUPS.keys()  # the page has words for each
    assert all(seconds >= 0 for seconds in card["seconds"].values())
    assert card["figures"].keys() == {
        "train", "train_augmented", "test", "temperature", "distance", "views", "lipschitz", "weights",
    }  # fmt: skip
    assert card["figures"]["distance"].keys() == {"train", "train_augmented"}
    assert [(one["layer"], one["batch_norm"]) for one in card["layers"]] == [("convolution", "norm"), ("head", None)]
    assert card["network"]["parameters"] == 36 + 8 + 15
    assert (card["data"]["train_examples"], card["data"]["test_examples"]) == (60, 30)
    histogram = card["confidence_histogram"]
    assert len(histogram["edges"]) == len(histogram["test"]) + 1 == len(histogram["train"]) + 1
    assert len(card["most_different"]) == 4
    distances = [entry["distance"] for entry in card["most_different"]]
    assert distances == sorted(distances, reverse=True)


def test_images_that_differ_most_are_the_right_rows_with_their_pixels() -> None:
    known = torch.full((60, 3), 1 / 3)
    data = random_data(channels=3, label_distribution=known)
    network = Linear(108)
    card = card_of(network, data, examples=30, most_different=3)
    for entry in card["most_different"]:
        image = data.train.images[entry["row"]]
        with torch.no_grad():
            prediction = network(image[None]).softmax(1)[0]
        assert entry["prediction"] == pytest.approx(prediction.tolist(), abs=1e-5)
        assert entry["distance"] == pytest.approx((prediction - 1 / 3).abs().sum().item() / 2, abs=1e-5)
        assert entry["label"] == data.train.labels[entry["row"]]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"]))))
        assert np.abs(pixels / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_right_labels_are_judged_beside_wrong_ones() -> None:
    data = random_data()
    predicted = Linear(36)(data.train.images).argmax(1)
    data = replace(data, train=replace(data.train, clean_labels=predicted))
    figures = card_of(Linear(36), data)["figures"]
    assert figures["train"]["accuracy_clean"] == 1
    assert figures["train"]["accuracy"] < 1
    assert "accuracy_clean" not in figures["test"]


def test_out_of_fold_predictions_stand_in_for_the_true_distribution() -> None:
    data = random_data()
    proxy = torch.rand(60, 3, generator=torch.Generator().manual_seed(5)).softmax(1)
    card = card_of(Linear(36), data, out_of_fold=proxy, examples=20)
    rows = sorted({entry["row"] for entry in card["most_different"]})
    assert card["figures"]["distance"].keys() == {"train_out_of_fold"}
    assert all(entry["distribution"] == pytest.approx(proxy[entry["row"]].tolist()) for entry in card["most_different"])
    assert len(rows) == 12
    assert any("out-of-fold predictions" in note for note in card["notes"])
    with pytest.raises(InputError, match=r"out-of-fold predictions have shape \[59, 3\]; wanted \[60, 3\]"):
        card_of(Linear(36), data, out_of_fold=proxy[1:])


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, owner: "Counting") -> Tensor:
        context.owner = owner
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        context.owner.images += 2 * len(gradient)
        return gradient, None


class Counting(Convolutional):
    """Counts by itself what runs through it."""

    images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return super().forward(_Counted.apply(images, self))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((60, 30), {}),
        ((2, 2), {"views": 10}),
        ((7, 3), {"slope_steps": 100}),
        ((90, 2), {"views": 10, "slope_steps": 20, "slope_examples": 1000, "gradient_examples": 1000}),
        ((40, 200), {"examples": 40}),
        ((40, 300), {"examples": None, "views": 2}),
    ],
)
def test_a_card_costs_at_most_fifteen_passes(sizes: tuple[int, int], options: dict[str, Any]) -> None:
    network = Counting()
    card = card_of(network, random_data(*sizes), **options)
    used = card["sampled"]["train"] + card["sampled"]["test"]
    assert card["passes"] <= MOST_PASSES
    assert network.images <= card["passes"] * used + 1e-6  # the norms of layers are counted, and run elsewhere
    assert card["passes"] * used - network.images <= 152
    less = card["sampled"]["slope"] < min(options.get("slope_examples", 128), card["sampled"]["train"])
    assert any(note.startswith("slope: ") for note in card["notes"]) == less
    assert (card["figures"]["lipschitz"]["largest_slope"] is None) == (card["sampled"]["slope"] == 0)
    json.dumps(card, allow_nan=False)


def test_a_card_is_the_same_every_time_and_depends_on_its_seed() -> None:
    data, network = random_data(), Convolutional()
    options = {"examples": 20, "gradient_examples": 8}
    cards = [card_of(network, data, **options) for _ in range(2)]
    other = card_of(network, data, seed=1, **options)
    for card in (*cards, other):
        assert card.pop("seconds").keys() == GROUPS.keys()
    assert cards[0] == cards[1]
    assert other["figures"]["views"] != cards[0]["figures"]["views"]
    assert other["figures"]["test"] != cards[0]["figures"]["test"]  # other images


def test_the_network_and_the_random_state_are_left_as_they_were() -> None:
    network = Convolutional().train()
    network.norm.eval()
    network.head.bias.requires_grad_(False)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    card = card_of(network, random_data())
    assert network.training
    assert not network.norm.training
    assert [name for name, one in network.named_parameters() if not one.requires_grad] == ["head.bias"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is None for one in network.parameters())
    card.pop("seconds")
    evaluated = card_of(network.eval(), random_data())
    evaluated.pop("seconds")
    assert evaluated == card


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_than_float32_are_judged_in_float32_and_kept(dtype: torch.dtype) -> None:
    data = random_data()
    classifier = Classifier(Convolutional().to(dtype), mean=data.mean, std=data.std)
    single = copy.deepcopy(classifier).float()
    card = card_of(classifier, data)
    assert classifier.network.head.weight.dtype == dtype
    assert card["figures"] == card_of(single, data)["figures"]
    with measured(single, "cpu") as (ready, _):
        assert ready is single


class Ends(nn.Module):
    """A network that ends in something."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(36, 3), end

    def forward(self, images: Tensor) -> Any:
        return self.end(self.layer(images.flatten(1)))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda logits: logits.softmax(1), "puts out probabilities .* wanted logits"),
        (lambda logits: (logits, logits), r"wanted logits \[B, K\] from Ends, got tuple"),
        (lambda logits: {"logits": logits}, r"wanted logits \[B, K\] from Ends, got dict"),
        (lambda logits: logits[:, 0], r"wanted logits \[B, K\] from Ends, got \[60\]"),
        (lambda logits: logits[:, :2], "puts out 2 numbers for each image, wanted logits of 3 classes"),
        (lambda logits: torch.cat((logits, logits), 1), "puts out 6 numbers for each image, wanted logits of 3"),
        (lambda logits: logits * math.inf, "puts out values that are not finite"),
        (lambda logits: logits / 0 * 0, "puts out values that are not finite"),
    ],
)
def test_a_network_that_emits_no_logits_is_refused_in_one_line(end: Any, message: str) -> None:
    network = Ends(end)
    with pytest.raises(InputError, match=message) as caught:
        card_of(network.train(), random_data())
    assert "\n" not in str(caught.value)
    assert network.training


def test_log_probabilities_are_logits() -> None:
    assert card_of(Ends(lambda logits: logits.log_softmax(1)), random_data())["figures"]["test"]["nll"] > 0


def test_a_split_of_one_image_is_refused() -> None:
    with pytest.raises(InputError, match="a card needs at least 2 images of each split, and made has 1 in test"):
        card_of(Linear(36), random_data(num_test=1))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"examples": 1}, "examples"), ({"views": 1}, "views"), ({"views": 11}, "views"),
        ({"slope_radius": 0.0}, "slope_radius"), ({"slope_steps": 0}, "slope_steps"), ({"seed": -1}, "seed"),
        ({"most_different": 0}, "most_different"), ({"viewz": 3}, "unknown key"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        CardConfig(**settings)


def unbalanced() -> DataSet:
    """Give 100 images of which 80, 15 and 5 are of the three classes."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([80, 15, 5]))
    images = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return data_of((images, labels), (images, labels))


def test_figures_of_a_sample_estimate_those_of_the_split() -> None:
    # A network that always says "a" is right as often as there are images of it among those used.
    accuracies = []
    for seed in range(40):
        card = card_of(Constant([2.0, 0.0, 0.0]), unbalanced(), SAME, examples=30, seed=seed)
        assert card["sampled"]["train"] == card["sampled"]["test"] == 30
        accuracies += [card["figures"][split]["accuracy"] for split in ("train", "test")]
    deviation = math.sqrt(0.8 * 0.2 / 30 * 70 / 99)  # without replacement
    assert np.mean(accuracies) == pytest.approx(0.8, abs=3 * deviation / math.sqrt(80))
    assert np.std(accuracies, ddof=1) == pytest.approx(deviation, rel=0.3)


def test_samples_are_nested_seeded_and_in_order() -> None:
    data = unbalanced()

    def rows(examples: int | None, seed: int = 0) -> dict[str, list[int]]:
        found = sample_of(data, CardConfig(examples=examples, seed=seed), None).rows
        return {name: split.tolist() for name, split in found.items()}

    for split in ("train", "test"):
        few, more = rows(10)[split], rows(60)[split]
        assert few == rows(10)[split] == sorted(set(few))
        assert set(few) < set(more)
        assert more == sorted(set(more))
        assert (len(few), len(more)) == (10, 60)
        assert few != rows(10, seed=1)[split]
        assert rows(100)[split] == rows(None)[split] == rows(5000)[split] == list(range(100))
    assert rows(10)["train"] != rows(10)["test"]
    assert torch.equal(
        sample_of(data, CardConfig(examples=10), None).splits["train"].labels, data.train.labels[rows(10)["train"]]
    )


def test_weights_of_layers_that_never_run_do_not_count() -> None:
    network = Convolutional()
    alone = card_of(network, random_data())["figures"]["weights"]
    network.unused = nn.Linear(50, 50)
    nn.init.zeros_(network.unused.weight)
    assert card_of(network, random_data())["figures"]["weights"] == alone


def test_products_are_of_float32_while_a_card_is_made() -> None:
    places = [(place, name) for place, name, _ in _places_of_precision()]
    assert len(places) >= 2
    before = [getattr(*place) for place in places]
    classifier = Classifier(Convolutional(), mean=[0.0], std=[1.0])
    with measured(classifier, "cpu"):
        assert all(getattr(place, name) == exact for place, name, exact in _places_of_precision())
    assert [getattr(*place) for place in places] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_figures_on_a_gpu_are_not_rounded_to_tf32() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3)
    images = torch.randn(8, 64, 16, 16)
    expected = layer.double()(images.double())
    with measured(Classifier(Convolutional(), mean=[0.0], std=[1.0]), "cuda"):
        found = layer.float().cuda()(images.cuda())
    assert (found.double().cpu() - expected).abs().max() < 1e-5


def test_images_in_files_work_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for place in range(count):
                Image.fromarray(random.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    cards: list[dict[str, Any]] = []
    for cache in (True, False):
        config = FolderConfig(path=tmp_path, image_size=8, in_memory=cache)
        data = config.load(tmp_path)
        uniform = torch.full((data.train.num_examples, 2), 0.5)
        data = replace(data, train=replace(data.train, label_distribution=uniform))
        spec = NetworkSpec(model="resnet8", num_classes=2, in_channels=3, mean=data.mean, std=data.std)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier = build_classifier(spec)
        card = make_card(classifier, spec, data, AugmentConfig(crop_padding=1), CardConfig(views=2), device="cpu")
        cards.append(card)
    assert cards[0]["figures"]["test"] == cards[1]["figures"]["test"]
    assert cards[0]["most_different"][0]["png"] is not None
