import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from soteacher.errors import InputError
from soteacher.files import read_json, write_json
from soteacher.report.card_charts import layer_chart
from soteacher.report.card_page import write_card, write_card_page
from soteacher.report.card_tables import (
    DISTANCES,
    GROUPS,
    PREDICTIONS,
    SINGLE,
    cost_sentence,
    distance_table,
    figure,
    prediction_table,
    seconds_table,
    single_table,
    zero_norms,
)

SPLITS = ("train", "train_augmented", "test")


def _png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def card() -> dict[str, Any]:
    """A card with values that are easy to follow."""
    of_split = {one.key: 0.25 for one in PREDICTIONS if one.key not in ("temperature", "accuracy_clean")}
    single: dict[str, dict[str, float]] = {}
    for place, one in enumerate(SINGLE):
        section, _, key = one.key.partition(".")
        single.setdefault(section, {})[key] = 0.5 + place
    bins = [
        {"lower": place / 4, "upper": (place + 1) / 4, "count": place, "confidence": place / 4 + 0.1, "accuracy": 0.5}
        if place
        else {"lower": 0.0, "upper": 0.25, "count": 0, "confidence": None, "accuracy": None}
        for place in range(4)
    ]
    return {
        "schema": 1, "soteacher_version": "0.1.0",
        "network": {"model": "wrn_16_1", "num_classes": 3, "parameters": 174_778, "checksum": "feed"},
        "data": {
            "name": "cifar10", "checksum": "beef", "class_names": ["cat", "<dog>", "ship"],
            "train_examples": 50_000, "test_examples": 10_000,
        },
        "sampled": {"train": 2000, "test": 2000, "views": 6, "gradient": 512, "slope": 128, "seed": 7},
        "figures": {
            **{name: dict(of_split) for name in SPLITS},
            **single,
            "temperature": {"train": 1.5, "test": 2.0},
            "distance": {"train_out_of_fold": {"mse": 0.125, "kl": 0.75, "total_variation": 0.0625}},
        },
        "layers": [
            {"layer": "conv1", "batch_norm": "bn1", "norm_1": 20.0, "norm_2": 2.0},
            {"layer": "fc", "batch_norm": None, "norm_1": 0.0, "norm_2": 1.0},
        ],
        "reliability": {"train": bins, "test": bins},
        "confidence_histogram": {"train": [0.0, 0.5, 0.5], "test": [0.2, 0.3, 0.5], "edges": [0.0, 0.3, 0.6, 1.0]},
        "most_different": [
            {
                "split": "test", "row": 17, "label": 1, "prediction": [0.8, 0.15, 0.05],
                "distribution": [0.1, 0.9, 0.0], "distance": 0.75, "png": _png(),
            },
            {
                "split": "test", "row": 3, "label": 0, "prediction": [0.5, 0.5, 0.0], "distribution": [1.0, 0.0, 0.0],
                "distance": 0.5, "png": None,
            },
        ],
        "seconds": dict.fromkeys(GROUPS, 1.25),
        "passes": 5.44,
        "notes": ["the augmentation changes nothing"],
    }  # fmt: skip


class _Text(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_every_figure_in_words(tmp_path: Path, card: dict[str, Any]) -> None:
    path = write_card(tmp_path / "out", card)
    assert path == tmp_path / "out/card.html"
    assert read_json(tmp_path / "out/card.json") == card
    text = _Text(path.read_text(encoding="utf-8")).text
    for one in (*PREDICTIONS, *DISTANCES, *SINGLE):
        if one.key != "accuracy_clean":
            assert one.label in text
            assert one.meaning in text
    for part in (
        "Teacher card: wrn_16_1 on cifar10",
        "soteacher 0.1.0; weights feed; data beef",
        "wrn_16_1, 174,778 parameters",
        "2,000 of 50,000 train images and 2,000 of 10,000 test images, random samples (seed 7)",
        "6 augmented views of each; gradients at 512; a slope searched around 128",
        "The augmentation changes nothing.",
        "5.4 evaluation passes over 4,000 images in 12.5 seconds",
        "Reliability of wrn_16_1",
        "Norms of the layers",
        "test image 17: <dog>; distance 0.75",
        *GROUPS.values(),
    ):
        assert part in text, part


def test_the_page_is_whole_in_itself_and_the_same_for_the_same_card(tmp_path: Path, card: dict[str, Any]) -> None:
    first = write_card(tmp_path / "one", card).read_bytes()
    assert write_card(tmp_path / "two", card).read_bytes() == first
    text = first.decode()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for tag in ("<script", "<link", "<iframe", "@import"):
        assert tag not in text
    assert re.findall(r'src="([^"]{,22})', text) == ["data:image/png;base64,"]
    assert "mathdefault" not in text
    assert "<dog>" not in text  # names are escaped
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    write_json(tmp_path / "one/card.json", card | {"passes": 1.0})
    assert write_card_page(tmp_path / "one").read_bytes() != first


def test_the_pictures_have_bars_of_both_distributions(tmp_path: Path, card: dict[str, Any]) -> None:
    text = write_card(tmp_path, card).read_text(encoding="utf-8")
    assert f'src="data:image/png;base64,{_png()}" alt="test image 17, labelled &lt;dog&gt;"' in text
    bars = re.findall(r'class="network" x="0" y="1" width="([\d.]+)".*?class="reference" .*?width="([\d.]+)"', text)
    # Sorted by the larger of the two.
    assert bars[:3] == [("15.0", "90.0"), ("80.0", "10.0"), ("5.0", "0.0")]
    assert "15 / 90 %" in text


def test_a_card_with_little_in_it_has_a_page(tmp_path: Path, card: dict[str, Any]) -> None:
    bare = copy.deepcopy(card)
    bare |= {"layers": [], "most_different": [], "notes": []}
    bare["figures"]["distance"] = {}
    bare["figures"]["train_augmented"] = dict.fromkeys(bare["figures"]["train"])
    bare["figures"]["lipschitz"] = dict.fromkeys(bare["figures"]["lipschitz"])
    text = _Text(write_card(tmp_path, bare).read_text(encoding="utf-8")).text
    for part in ("Norms of the layers", "Where it differs most", "Distance to the"):
        assert part not in text
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_tables_hold_the_values_in_their_columns(card: dict[str, Any]) -> None:
    card["figures"]["train"] |= {"accuracy": 0.875, "accuracy_clean": 0.5}
    card["figures"]["test"]["nll"] = None
    rows = {row[0]: row[1:-1] for row in prediction_table(card).rows}
    assert rows["accuracy, %"] == ("87.50", "25.00", "25.00")
    assert rows["accuracy on right labels, %"] == ("50.00", "-", "-")
    assert rows["NLL, nats"] == ("0.2500", "0.2500", "-")
    assert rows["fitted temperature"] == ("1.500", "-", "2.000")
    table = distance_table(card)
    assert table.columns == ("distance", "train, to out-of-fold predictions", "what it is")
    assert [row[1] for row in table.rows] == ["0.1250", "0.7500", "0.06250"]
    assert len(single_table(card).rows) == len(SINGLE)
    assert seconds_table(card).rows[0] == (GROUPS["predictions"], "1.25")
    assert cost_sentence(card).startswith("5.4 evaluation passes over 4,000 images in 12.5 seconds;")
    del card["figures"]["train"]["accuracy_clean"]
    assert "accuracy on right labels, %" not in {row[0] for row in prediction_table(card).rows}


def test_out_of_fold_predictions_are_not_called_known_or_true(tmp_path: Path, card: dict[str, Any]) -> None:
    for entry in card["most_different"]:
        entry["split"] = "train"
    text = _Text(write_card(tmp_path, card).read_text(encoding="utf-8")).text
    for part in (
        "Distance to the out-of-fold predictions",
        "truly distributed, which is not known here. Out-of-fold predictions stand in for it: they are networks'",
        "lies farthest from the out-of-fold predictions, which are networks' opinions, by total variation.",
        "network out-of-fold predictions",
    ):
        assert part in text
    assert "known distribution" not in text
    assert "the label distribution" not in text


def test_both_kinds_of_references_are_told_apart(tmp_path: Path, card: dict[str, Any]) -> None:
    card["most_different"][0]["split"] = "train"
    card["figures"]["distance"]["test"] = card["figures"]["distance"]["train_out_of_fold"]
    text = _Text(write_card(tmp_path, card).read_text(encoding="utf-8")).text
    assert "Distance to the label distribution" in text
    assert (
        "farthest from the out-of-fold predictions, which are networks' opinions (train images) and the label "
        "distribution that is known of them (test images), by"
    ) in text
    assert "out-of-fold predictions or known distribution" in text


def test_a_known_distribution_is_called_that(tmp_path: Path, card: dict[str, Any]) -> None:
    card["figures"]["distance"] = {"train": card["figures"]["distance"]["train_out_of_fold"]}
    text = _Text(write_card(tmp_path, card).read_text(encoding="utf-8")).text
    assert "how their labels are truly distributed: the smaller these, the better." in text
    assert "network known distribution" in text
    assert "out-of-fold" not in text


def test_layers_of_norm_0_are_named_in_page_and_caption(tmp_path: Path, card: dict[str, Any]) -> None:
    card["layers"] = [
        {"layer": f"layer{place}", "batch_norm": "bn", "norm_1": 0.0, "norm_2": 0.0} for place in (1, 2)
    ] + [{"layer": "fc", "batch_norm": None, "norm_1": 1.0, "norm_2": 1.0}]
    words = (
        "2 layers have norm 0 (layer1, layer2): their batch norm scales with 0, so the product is 0 and has no "
        "logarithm."
    )
    assert zero_norms(card) == words
    assert layer_chart(card).caption.endswith(words)
    assert _Text(write_card(tmp_path, card).read_text(encoding="utf-8")).text.count(words) == 2


@pytest.mark.parametrize(
    ("batch_norms", "start"),
    [
        ([], ""),
        ([None], "1 layer has norm 0 (a0): its weights are 0, so"),
        (["bn"], "1 layer has norm 0 (a0): its batch norm scales with 0, so"),
        (["bn", None], "2 layers have norm 0 (a0, a1): their weights are 0, or their batch norm scales with 0, so"),
        (["bn"] * 8, "8 layers have norm 0 (a0, a1, a2, a3, a4, a5 and 2 more): their batch norm scales with 0, so"),
    ],
)
def test_zero_norms_have_their_reason(batch_norms: list[str | None], start: str) -> None:
    layers = [
        {"layer": f"a{place}", "batch_norm": one, "norm_1": 0.0, "norm_2": 0.0} for place, one in enumerate(batch_norms)
    ]
    found = zero_norms({"layers": [*layers, {"layer": "b", "batch_norm": None, "norm_1": 1.0, "norm_2": 1.0}]})
    assert found.startswith(start)
    assert bool(found) == bool(batch_norms)


def test_figures_in_nats_and_slopes_say_their_unit() -> None:
    for one in (*PREDICTIONS, *DISTANCES, *SINGLE):
        if "nll" in one.key or one.key in ("entropy", "kl", "conditional_mutual_information"):
            assert one.label.endswith(", nats")
        if "gradient" in one.key or "slope" in one.key:
            assert one.label.endswith("per unit of image distance")


def test_texts_of_the_charts_are_of_one_size(tmp_path: Path, card: dict[str, Any]) -> None:
    text = write_card(tmp_path, card).read_text(encoding="utf-8")
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)}
    assert sizes
    assert max(sizes) <= 1.2 * min(sizes)


def test_blue_is_lighter_on_dark_pages(tmp_path: Path, card: dict[str, Any]) -> None:
    text = write_card(tmp_path, card).read_text(encoding="utf-8")
    assert re.search(r"screen and \(prefers-color-scheme: dark\) \{\s*svg \[style\*=\"stroke: #0072b2\"\]", text)
    # As the charts write it, else the rule would not hold.
    assert re.search(r'style="[^"]*stroke: #0072b2', text)
    assert re.search(r'style="[^"]*fill: #0072b2', text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (123.456, "123.5"),
        (0.00001234, "1.234e-05"),
        (-2.5, "-2.500"),
        (0.0325, "0.03250"),
        (0.00025, "0.0002500"),
        (9.99996, "10.00"),
        (1234.6, "1235"),
        (12345.0, "1.234e+04"),
    ],
)
def test_figures_have_four_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_layers_of_a_deep_network_share_their_names_room(card: dict[str, Any]) -> None:
    card["layers"] = [
        {"layer": f"layer{place}x", "batch_norm": None, "norm_1": 3.0, "norm_2": 2.0} for place in range(200)
    ]
    svg = layer_chart(card).svg
    assert len(re.findall(r"layer\d+x", svg)) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no teacher card at"),
        ("{}", "there is no teacher card at"),
        ('{"schema": 2, "figures": {}}', "has schema 2; this version reads schema 1"),
        ("{", "cannot be read"),
        ("[]", "holds a list; wanted a mapping"),
    ],
)
def test_what_is_no_card_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "card.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        write_card_page(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "card.html").exists()
