"""The cards of a run's teachers: their figures by name and in words, side by side; which are of one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from soteacher.report.card_tables import DISTANCE_SECTIONS, DISTANCES, PREDICTIONS, SECTIONS, SINGLE, Figure
from soteacher.report.record import NetworkRecord, RunRecord
from soteacher.report.tables import Table, percent

_KNOWN: dict[str, tuple[str, Figure]] = {
    **{f"{key}.{one.key}": (f"{split}: {one.label}", one) for key, split in SECTIONS.items() for one in PREDICTIONS},
    **{f"{one.key}.{key}": (f"{split}: {one.label}", one) for key, split in SECTIONS.items() for one in PREDICTIONS},
    **{
        f"distance.{key}.{one.key}": (f"distance, {split}: {one.label}", one)
        for key, split in DISTANCE_SECTIONS.items()
        for one in DISTANCES
    },
    **{one.key: (one.label, one) for one in SINGLE},
}
"""Words of the figures by dotted name, those of a card's own page; a fitted temperature has its split behind it."""
_IN_TABLE = (
    *("train.accuracy", "test.accuracy", "train.nll", "test.nll", "test.ece", "test.ece_calibrated"),
    *("distance.train.mse", "distance.train.kl", "distance.test.mse", "distance.test.kl"),
    *("distance.train_out_of_fold.mse", "distance.train_out_of_fold.kl", "train.entropy", "test.entropy"),
    *("train.conditional_mutual_information", "views.prediction_variance", "views.true_class_stddev"),
    *("lipschitz.log10_product_1", "lipschitz.log10_product_2", "lipschitz.input_gradient_mean"),
    *("lipschitz.input_gradient_95", "lipschitz.largest_slope"),
)
"""The figures of the table of teachers; the others are set against the students only."""
CHOSEN = (
    *("train.accuracy", "test.accuracy", "test.nll", "test.ece", "test.ece_calibrated", "test.entropy"),
    *("distance.train.mse", "distance.test.mse", "distance.train_out_of_fold.mse"),
    *("train.conditional_mutual_information", "views.prediction_variance", "views.true_class_stddev"),
    *("lipschitz.largest_slope", "lipschitz.input_gradient_95"),
)
"""The figures that are set against the students first. Fixed, whatever a run shows: the strongest of many correlations
is strong by chance too."""


def flat_figures(card: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that a card has by dotted name, such as ``distance.train.kl``, without those that are null.

    Args:
        card: what ``card.json`` holds; empty where there is none.
    """
    return dict(_flat(card.get("figures") or {}, ""))


def _flat(figures: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, float(value)


def figure_words(name: str) -> str:
    """Return a figure's dotted name in words, with its unit; a name that is not known, without its dots."""
    return _KNOWN[name][0] if name in _KNOWN else name.replace(".", ": ").replace("_", " ")


def in_its_unit(name: str, value: float) -> float:
    """Return a figure's value as it is shown: fractions that are shown in per cent times 100."""
    return 100 * value if name in _KNOWN and _KNOWN[name][1].write is percent else value


def carded_teachers(record: RunRecord) -> dict[str, list[NetworkRecord]]:
    """Return the teachers' networks that have a card with figures, by arm."""
    teachers = record.of_role("teacher").items()
    found = {arm: [network for network in networks if flat_figures(network.card)] for arm, networks in teachers}
    return {arm: networks for arm, networks in found.items() if networks}


def card_table(teachers: Mapping[str, Sequence[NetworkRecord]]) -> Table:
    """Return a row for each figure that some card has, a column for each teacher arm: means over its seeds."""
    figures = {arm: [flat_figures(network.card) for network in networks] for arm, networks in teachers.items()}
    shown = [name for name in _IN_TABLE if any(name in own for cards in figures.values() for own in cards)]
    rows: list[tuple[str, ...]] = [("seeds", *(str(len(cards)) for cards in figures.values()))]
    for name in shown:
        write: Callable[[float | None], str] = _KNOWN[name][1].write
        values = [[own[name] for own in cards if name in own] for cards in figures.values()]
        rows.append((figure_words(name), *(write(fmean(own) if own else None) for own in values)))
    return Table(columns=("figure", *figures), rows=tuple(rows), numeric=(False, *[True] * len(figures)))


def teacher_kinds(teachers: Mapping[str, Sequence[NetworkRecord]]) -> dict[str, tuple[str, ...]]:
    """Return the kinds of teachers by name, each with its arms: arms that are the same networks are one kind.

    They are where every seed has the same weights and the same figures in both, as an arm and a state of it that turned
    out to be its last.

    Args:
        teachers: see :func:`carded_teachers`.
    """
    found: list[list[str]] = []
    for arm, networks in teachers.items():
        same = next((arms for arms in found if _same_networks(teachers[arms[0]], networks)), None)
        if same is None:
            found.append([arm])
        else:
            same.append(arm)
    return {" = ".join(arms): tuple(arms) for arms in found}


def _same_networks(first: Sequence[NetworkRecord], second: Sequence[NetworkRecord]) -> bool:
    by_seed = [{one.seed: (_checksum(one), flat_figures(one.card)) for one in networks} for networks in (first, second)]
    return by_seed[0] == by_seed[1] and all(checksum for checksum, _ in by_seed[0].values())


def _checksum(network: NetworkRecord) -> str | None:
    return (network.card.get("network") or {}).get("checksum")


def same_network_notes(kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each kind of several arms: these teachers count once."""
    return [
        f"The teachers {', '.join(arms[:-1])} and {arms[-1]} are the same network in every seed and count as one kind "
        "in what follows."
        for arms in kinds.values()
        if len(arms) > 1
    ]
