from collections.abc import Callable
from pathlib import Path

from soteacher.report.cards import (
    card_table,
    carded_teachers,
    figure_words,
    flat_figures,
    in_its_unit,
    same_network_notes,
    teacher_kinds,
)
from soteacher.report.record import NetworkRecord, read_run


def test_figures_are_named_by_their_path() -> None:
    figures = {"test": {"nll": 0.5, "ece": None}, "distance": {"train": {"kl": 1}}, "views": {}}
    assert flat_figures({"schema": 1, "figures": figures}) == {"test.nll": 0.5, "distance.train.kl": 1.0}
    assert flat_figures({}) == flat_figures({"figures": None}) == {}


def test_figures_have_words_with_their_units() -> None:
    assert figure_words("train.accuracy") == "train: accuracy, %"
    assert figure_words("temperature.test") == "test: fitted temperature"
    assert figure_words("distance.train.kl").startswith("distance, train: KL")
    assert "out-of-fold" in figure_words("distance.train_out_of_fold.mse")
    assert figure_words("lipschitz.largest_slope").endswith("per unit of image distance")
    assert figure_words("mine.own_figure") == "mine: own figure"
    assert in_its_unit("train.accuracy", 0.25) == 25
    assert in_its_unit("test.ece", 0.25) == in_its_unit("mine.own_figure", 0.25) == 0.25


def test_every_figure_of_the_table_has_words() -> None:
    from soteacher.report.cards import _IN_TABLE, CHOSEN

    for names in (_IN_TABLE, CHOSEN):
        assert len(set(map(figure_words, names))) == len(names)
        assert all(figure_words(name) != name.replace(".", ": ").replace("_", " ") for name in names)


def test_card_table_holds_means_of_the_figures_that_some_card_has(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=2)
    (folder / "teachers/soteacher/seed1/card.json").unlink()
    table = card_table(carded_teachers(read_run(folder)))
    assert table.columns == ("figure", "standard", "soteacher")
    # The cards of standard have places 2 and 3 in the order of the folders, after the two of soteacher.
    assert table.rows == (
        ("seeds", "2", "1"),
        (figure_words("train.accuracy"), "98.00", "98.00"),
        (figure_words("test.accuracy"), "87.10", "87.00"),
        (figure_words("train.nll"), "0.1250", "0.1000"),
        (figure_words("test.ece"), "0.03250", "0.03000"),
        (figure_words("distance.train.kl"), "0.4950", "0.3000"),
        (figure_words("lipschitz.largest_slope"), "22.50", "-"),
    )
    assert table.numeric == (False, True, True)


def _teachers(**checksums: tuple[str | None, ...]) -> dict[str, list[NetworkRecord]]:
    """Return arms whose networks have these checksums, seed by seed, and one figure."""
    return {
        arm: [
            NetworkRecord(
                role="teacher", arm=arm, seed=seed, row=None, epochs=(), reliability={},
                card={"network": {"checksum": checksum}, "figures": {"test": {"nll": 0.5}}},
            )
            for seed, checksum in enumerate(own)
        ]
        for arm, own in checksums.items()
    }  # fmt: skip


def test_arms_of_the_same_networks_are_one_kind() -> None:
    kinds = teacher_kinds(_teachers(standard=("a", "b"), other=("c", "d"), best=("a", "b"), half=("a", "e")))
    assert kinds == {"standard = best": ("standard", "best"), "other": ("other",), "half": ("half",)}
    assert same_network_notes(kinds) == [
        "The teachers standard and best are the same network in every seed and count as one kind in what follows."
    ]


def test_arms_are_told_apart_by_seeds_figures_and_where_nothing_is_known() -> None:
    teachers = _teachers(one=("a",), two=("a",), three=("a", "a"), four=(None,), five=(None,))
    teachers["two"][0].card["figures"]["test"]["nll"] = 0.25
    assert list(teacher_kinds(teachers)) == ["one", "two", "three", "four", "five"]
    assert same_network_notes(teacher_kinds(teachers)) == []
