import csv
import re
from collections import Counter
from importlib.resources import files

import pytest

from soteacher.errors import InputError
from soteacher.reference import BestLastGap, Published, gap_best_last, matching, network_name, published
from soteacher.reference.published import COLUMNS, METHOD_ALIASES, NETWORK_ALIASES, read_published
from soteacher.reference.released_logs import COLUMNS as LOG_COLUMNS
from soteacher.reference.released_logs import read_gap

PAPER = "Dong, Liu, Shang, ICLR 2024, arXiv:2206.06661"
LINE = {
    "data": "cifar100",
    "role": "student",
    "method": "kd",
    "published_as": "KD",
    "teacher": "wrn_40_2",
    "teacher_method": "standard",
    "student": "wrn_40_1",
    "accuracy_percent": "73.54",
    "std_percent": "",
    "epochs": "240",
    "epoch_reported": "last",
    "note": "",
    "source": "somewhere",
}


def _table(**changes: str) -> str:
    return ",".join(COLUMNS) + "\n" + ",".join({**LINE, **changes}[column] for column in COLUMNS) + "\n"


def test_published_holds_every_row() -> None:
    rows = published()
    assert Counter(row.data for row in rows) == {"cifar100": 750, "imagenet": 84, "tiny_imagenet": 4}
    assert len(set(rows)) == len(rows)
    by_source = Counter(row.source for row in rows)
    assert by_source["HobbitLong/RepDistiller README"] == 188
    assert by_source["zkxufo/TTM README"] == 65 + 28
    assert by_source[PAPER] == 16
    assert published() is rows


def test_published_rows_are_complete() -> None:
    for row in published():
        assert row.source
        assert row.published_as
        assert row.teacher
        assert row.student
        assert 0.4 < row.accuracy < 0.9
        assert row.std is None or 0 < row.std < 0.01
        assert row.epochs in (None, 240, 480)
        if row.role == "teacher" or row.method == "alone":
            assert row.teacher_method is None


def test_published_protocols_follow_their_sources() -> None:
    protocols: dict[str, set[tuple[int | None, str]]] = {}
    for row in published():
        protocols.setdefault(row.source, set()).add((row.epochs, row.epoch_reported))
    assert protocols["HobbitLong/RepDistiller README"] == {(240, "last")}
    assert protocols["megvii-research/mdistiller README"] == {(240, "best")}
    assert protocols["sunshangquan/logit-standardization-KD README"] == {(240, "best"), (480, "best")}
    assert protocols["JiamingLv/WKD README"] == {(None, "unknown")}
    multi_level = {row.epochs for row in published() if (row.method or "").startswith("mlkd")}
    assert multi_level == {480}


@pytest.mark.parametrize(
    ("network", "method", "expected"),
    [
        (("resnet110", "resnet32"), "kd", [(0.7308, 240, "last")]),
        (("wrn_40_2", "shufflenet_v1"), "crd", [(0.7605, 240, "last")]),
        (("vgg13", "vgg8"), "dot", [(0.7377, 240, "best")]),
        (("resnet32x4", "wrn_40_2"), "mlkd_standardized", [(0.7966, 480, "best")]),
        (("resnet32x4", "resnet8x4"), "wkd", [(0.7728, None, "unknown")]),
        (("resnet50", "mobilenet_v2"), "sdd_dkd", [(0.7136, None, "unknown")]),
        (("resnet32x4", "resnet8x4"), "crd_kd", [(0.7559, None, "unknown")]),
        (("resnet32x4", "vgg13"), "kd", [(0.7717, None, "unknown")]),
        (("resnet32x4", "vgg13"), "fitnet", []),  # published with a KD term, which is another method
        (("resnet32x4", "shufflenet_v2"), "nkd", [(0.7626, None, "unknown")]),
    ],
)
def test_matching_distilled_students(
    network: tuple[str, str], method: str, expected: list[tuple[float, int | None, str]]
) -> None:
    found = matching(data="cifar100", teacher=network[0], student=network[1], method=method)
    assert [(row.accuracy, row.epochs, row.epoch_reported) for row in found] == expected
    assert all((row.teacher, row.student) == network for row in found)


def test_matching_keeps_spread_and_notes() -> None:
    found = matching(data="cifar100", teacher="wrn_40_2", student="wrn_40_1", method="dist")
    (own,) = [row for row in found if row.std is not None]
    assert (own.accuracy, own.std, own.note, own.source) == (0.7443, 0.0024, "own code", "hunto/DIST_KD README")
    (mean,) = [
        row
        for row in matching(data="cifar100", teacher="wrn_40_2", student="wrn_16_2", method="dkd")
        if row.note == "mean of 5"
    ]
    assert mean.accuracy == 0.7623


def test_matching_tells_teachers_by_how_they_were_trained() -> None:
    pair = {"data": "cifar100", "teacher": "wrn_40_2", "student": "wrn_40_1", "method": "kd"}
    assert [row.accuracy for row in matching(**pair)] == [0.7354, 0.7373]
    assert [row.accuracy for row in matching(**pair, teacher_method="soteacher")] == [0.7435]
    assert matching(**pair, teacher_method="soteacher_released") == matching(**pair, teacher_method="soteacher")
    assert matching(**pair, teacher_method="label_smoothing") == ()


def test_what_is_from_memory_says_so() -> None:
    seen = {row.accuracy for row in published() if row.source == PAPER and not row.note}
    assert seen == {0.7373, 0.7638, 0.7435, 0.7495}
    assert sum(row.note.startswith("from memory") for row in published()) == 12
    ablations = [row.accuracy for row in published() if row.published_as == "KD from SoTeacher without CR"]
    assert ablations == [0.7434, 0.7520, 0.7652]


def test_matching_networks_without_another_come_once() -> None:
    found = matching(data="cifar100", teacher=None, student="resnet20", method="alone")
    assert [row.accuracy for row in found] == [0.6906, 0.6953, 0.6963, 0.6962]
    assert {row.teacher for row in found} == {None}
    teachers = matching(data="cifar100", teacher="resnet32x4", student=None, method="standard")
    assert [row.accuracy for row in teachers] == [0.7942, 0.7963, 0.7963, 0.7922]
    assert {(row.student, row.role) for row in teachers} == {(None, "teacher")}
    assert matching(data="cifar100", teacher=None, student="resnet20", method="kd") == ()
    assert matching(data="cifar100", teacher="wrn_40_2", student=None, method="alone") == ()


@pytest.mark.parametrize("spelling", sorted(NETWORK_ALIASES))
def test_matching_takes_the_fields_spelling(spelling: str) -> None:
    name = NETWORK_ALIASES[spelling]
    assert network_name(spelling) == network_name(name) == name
    rows = [row for row in published() if name in (row.teacher, row.student)]
    assert rows
    teacher, student = ((spelling if side == name else side) for side in (rows[0].teacher, rows[0].student))
    assert rows[0].method is not None
    asked = {"data": rows[0].data, "teacher": teacher, "student": student, "method": rows[0].method}
    if rows[0].method in ("alone", "standard"):
        asked["teacher" if rows[0].method == "alone" else "student"] = None
    assert rows[0].accuracy in [row.accuracy for row in matching(**asked)]


def test_matching_takes_timm_networks() -> None:
    pair = {"data": "imagenet", "method": "wkd", "student": "timm/resnet18"}
    (found,) = matching(**pair, teacher="timm/resnet34")
    assert found.accuracy == 0.7276
    assert matching(**pair, teacher="timm/resnet34.a1_in1k") == (found,)
    assert network_name("timm/resnet34.a1_in1k") == "timm/resnet34"


def test_networks_of_one_name_but_another_shape_stay_apart() -> None:
    found = matching(data="cifar100", teacher=None, student="MobileNetV2", method="alone")
    assert 0.7351 not in [row.accuracy for row in found]
    assert [row.accuracy for row in published() if row.student == "MobileNetV2 (HSAKD)" and row.method == "alone"] == [
        0.7351,
        0.7351,
    ]


def test_no_network_stands_under_two_names() -> None:
    for row in published():
        for name in (row.teacher, row.student):
            assert name is not None
            assert name not in NETWORK_ALIASES
            assert re.fullmatch(r"[a-z0-9_]+|timm/[a-z0-9_]+|MobileNetV2 \(HSAKD\)", name), name
        assert row.method not in METHOD_ALIASES


def test_methods_without_a_name_here_are_kept() -> None:
    unnamed = Counter(row.published_as for row in published() if row.method is None)
    assert unnamed["WCoRD"] == unnamed["WTTM+CRD"] == 13
    assert unnamed["SimKD (f=4)"] == 3
    assert unnamed["teacher (HSAKD* joint aux training)"] == 8


def test_matching_wants_a_network() -> None:
    with pytest.raises(InputError, match="got neither a teacher nor a student; wanted at least one network"):
        matching(data="cifar100", teacher=None, student=None, method="kd")


def test_read_published_reads_a_line() -> None:
    (row,) = read_published(_table(std_percent="0.25", epochs="", method="", note="own code"), origin="a.csv")
    assert row == Published(
        data="cifar100",
        role="student",
        method=None,
        published_as="KD",
        teacher="wrn_40_2",
        teacher_method="standard",
        student="wrn_40_1",
        accuracy=0.7354,
        std=0.0025,
        epochs=None,
        epoch_reported="last",
        note="own code",
        source="somewhere",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "a.csv, line 2: source is empty; wanted a name"),
        ({"teacher": ""}, "a.csv, line 2: teacher is empty; wanted a name"),
        ({"role": "pupil"}, "a.csv, line 2: role must be teacher or student, got 'pupil'"),
        ({"epoch_reported": "first"}, "a.csv, line 2: epoch_reported must be last or best or unknown, got 'first'"),
        ({"accuracy_percent": "high"}, "a.csv, line 2: accuracy_percent must be a number, got 'high'"),
        ({"accuracy_percent": ""}, "a.csv, line 2: accuracy_percent must be a number, got ''"),
        ({"accuracy_percent": "100.5"}, r"a.csv, line 2: accuracy_percent must lie in \[0, 100\], got 100.5"),
        ({"std_percent": "-1"}, r"a.csv, line 2: std_percent must lie in \[0, 100\], got -1"),
        ({"epochs": "240.5"}, "a.csv, line 2: epochs must be a whole number above 0, got '240.5'"),
        ({"epochs": "0"}, "a.csv, line 2: epochs must be a whole number above 0, got '0'"),
        ({"note": "one,two"}, "a.csv, line 2 has 14 values; wanted 13"),
    ],
)
def test_read_published_refuses_bad_lines(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$") as caught:
        read_published(_table(**changes), origin="a.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "had"), [("", "none"), ("data,role\n", "data, role")])
def test_read_published_refuses_other_columns(text: str, had: str) -> None:
    with pytest.raises(InputError, match=f"a.csv has the columns {had}; wanted data, role, method, published_as"):
        read_published(text, origin="a.csv")


def test_gap_best_last_is_computed_from_the_logs() -> None:
    text = (files("soteacher.reference") / "best_and_last.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    hundredths = [round(100 * float(row["best_percent"])) - round(100 * float(row["last_percent"])) for row in rows]
    gap = gap_best_last()
    assert gap.num_logs == len(rows) == 41
    assert gap.mean == pytest.approx(sum(hundredths) / 41 / 1e4)
    assert gap.highest == pytest.approx(max(hundredths) / 1e4)
    assert (round(100 * gap.mean, 2), round(100 * gap.highest, 2)) == (0.32, 0.92)


def test_read_gap_of_two_logs() -> None:
    heading = ",".join(LOG_COLUMNS)
    text = f"{heading}\ncifar100,a.txt,240,70.5,70.25,70.3,here\ncifar100,b.txt,240,75.0,74.0,74.2,here\n"
    expected = BestLastGap(num_logs=2, mean=pytest.approx(0.00625), highest=pytest.approx(0.01))
    assert read_gap(text, origin="logs.csv") == expected
    with pytest.raises(InputError, match=r"logs.csv, line 2: best_percent 70 lies below last_percent 71$"):
        read_gap(f"{heading}\ncifar100,a.txt,240,70,71,70,here\n", origin="logs.csv")
    with pytest.raises(InputError, match="has no logs; wanted at least one"):
        read_gap(f"{heading}\n", origin="logs.csv")
