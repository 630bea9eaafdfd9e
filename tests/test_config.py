from pathlib import Path
from typing import Any

import pytest
import yaml

from soteacher.config import Student, StudyConfig, TrainedTeacher, differences, terms_of, to_yaml
from soteacher.errors import InputError
from soteacher.settings import parse

TREE: dict[str, Any] = {
    "name": "example",
    "data": {"source": "fashion_mnist_small"},
    "seeds": [0, 1],
    "baseline": "standard-kd",
    "training": {"epochs": 10, "optimizer": {"learning_rate": 0.1}},
    "teachers": {
        "standard": {"model": "wrn_16_2", "method": "standard"},
        "soteacher": {"model": "wrn_16_2", "method": "soteacher", "terms": {"lipschitz": {"weight": 1e-4}}},
        "early": {"from": "standard", "after": 0.5},
        "old": {"file": "old/model.safetensors"},
    },
    "students": {
        "alone": {"model": "resnet8", "method": "alone"},
        "kd": {"model": "resnet8", "method": "kd", "training": {"epochs": 5}},
        "hot": {"model": "resnet8", "terms": {"kd": {"temperature": 8}}, "teachers": ["soteacher"]},
    },
}


def _study(**over: Any) -> StudyConfig:
    return parse(StudyConfig, TREE | over)


def _with(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(TREE))
    *parents, last = path.split(".")
    table = tree
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value
    return tree


def test_arms_are_named_after_teacher_and_student() -> None:
    arms = {arm.name: (arm.student, arm.teacher, arm.baseline) for arm in _study().arms()}
    assert arms == {
        "alone": ("alone", None, "standard-kd"),
        "standard-kd": ("kd", "standard", None),
        "soteacher-kd": ("kd", "soteacher", "standard-kd"),
        "early-kd": ("kd", "early", "standard-kd"),
        "old-kd": ("kd", "old", "standard-kd"),
        "soteacher-hot": ("hot", "soteacher", "standard-kd"),
    }


def test_a_students_own_baseline_goes_before_the_studys() -> None:
    study = parse(StudyConfig, _with("students.hot.baseline", "soteacher-kd"))
    baselines = {arm.name: arm.baseline for arm in study.arms()}
    assert baselines["soteacher-hot"] == "soteacher-kd"
    assert baselines["soteacher-kd"] == "standard-kd"


def test_training_of_lays_a_networks_own_settings_over_the_studys() -> None:
    study = _study()
    training = study.training_of(study.students["kd"])
    assert (training.epochs, training.optimizer.learning_rate, training.batch_size) == (5, 0.1, 64)
    assert study.training_of(study.students["alone"]) == study.training


def test_training_of_replaces_an_optimiser_of_another_name() -> None:
    study = parse(StudyConfig, _with("students.kd.training", {"optimizer": {"name": "adamw"}}))
    assert study.training_of(study.students["kd"]).optimizer.learning_rate == 1e-3


def test_terms_are_those_of_the_method_with_settings_over_them() -> None:
    terms = terms_of(TrainedTeacher(model="x", method="soteacher", terms={"lipschitz": {"weight": 0.5}}))
    assert list(terms) == ["cross_entropy", "lipschitz", "consistency"]
    assert (terms["lipschitz"].weight, terms["consistency"].ramp) == (0.5, "linear")


def test_null_leaves_a_term_out_and_a_new_name_adds_one() -> None:
    terms = terms_of(TrainedTeacher(model="x", method="soteacher", terms={"lipschitz": None, "weight_l1": {}}))
    assert list(terms) == ["cross_entropy", "consistency", "weight_l1"]
    assert terms_of(TrainedTeacher(model="x", terms={"consistency": None})).keys() == {"cross_entropy"}


def test_a_method_without_its_teacher_term_is_a_student_alone() -> None:
    study = parse(StudyConfig, _with("students.hot", {"model": "resnet8", "method": "kd", "terms": {"kd": None}}))
    assert "hot" in {arm.name for arm in study.arms()}


def test_to_yaml_reads_back_equal(tmp_path: Path) -> None:
    study = _study(
        data={"source": "npz", "path": str(tmp_path / "a b.npz"), "mean": [0.5], "std": [0.25]},
        training={"optimizer": {"name": "adamw", "betas": [0.8, 0.99]}, "schedule": {"name": "cosine"}},
        teachers=TREE["teachers"]
        | {"none": {"model": "resnet8", "terms": {"cross_entropy": {"label_smoothing": 0.1}}}},
        description="Grüße: one # two",
    )
    again = parse(StudyConfig, yaml.safe_load(to_yaml(study)))
    assert again == study
    assert to_yaml(again) == to_yaml(study)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", [0], "unknown key 'seed'; did you mean seeds"),
        ("seeds", [], "seeds: seeds must be at least one and all different, got []"),
        ("seeds", [1, 1], "seeds: seeds must be at least one and all different, got [1, 1]"),
        ("seeds", [-1], "seeds.0: should be greater than or equal to 0, got -1"),
        ("seeds", 3, "seeds: should be a list, such as [a, b], got 3"),
        ("name", "a/b", "name: String should match pattern"),
        ("baseline", "standart-kd", "unknown baseline arm 'standart-kd'; did you mean standard-kd"),
        ("students.kd.baseline", "kd", "unknown baseline arm 'kd'"),
        ("data", {"source": "fashion_mnist_smal"}, "data: unknown source 'fashion_mnist_smal'; did you mean fashion"),
        ("data", {}, "data: source is missing, and needed"),
        ("data", {"source": "npz"}, "data.path: missing, and needed"),
        ("data.train_examples", 0, "data.train_examples: should be greater than 0, got 0"),
        ("teachers.standard.model", 3, "teachers.standard.model: should be a valid string, got 3"),
        ("teachers.standard", {"method": "standard"}, "teachers.standard.model: missing, and needed"),
        ("teachers.standard.metod", "kd", "teachers.standard: unknown key 'metod'; did you mean method"),
        (
            "teachers.standard.method",
            "soteacherr",
            "teachers.standard.method: unknown method 'soteacherr'; did you mean",
        ),
        (
            "teachers.standard.method",
            "kd",
            "teachers.standard.method: kd is a method for a student, wanted one for a teac",
        ),
        (
            "students.kd.method",
            "soteacher",
            "students.kd.method: soteacher is a method for a teacher, wanted one for a s",
        ),
        (
            "teachers.standard.terms",
            {"kd": {}},
            "teachers.standard: kd reads a teacher; name the one that it learns from",
        ),
        (
            "teachers.standard.terms",
            {"lipshitz": {}},
            "teachers.standard.terms: unknown objective 'lipshitz'; did you mea",
        ),
        (
            "teachers.standard.terms",
            {"lipschitz": {"weight": -1}},
            "teachers.standard.terms.lipschitz.weight: should be greater than 0, got -1",
        ),
        (
            "teachers.standard.terms",
            {"lipschitz": {"weihgt": 1}},
            "teachers.standard.terms.lipschitz: unknown key 'weihgt'; did you mean weight?",
        ),
        (
            "students.kd.terms",
            {"kd": {"temperature": 0}},
            "students.kd.terms.kd.temperature: should be greater than 0, got 0",
        ),
        ("teachers.standard.terms", {"cross_entropy": None}, "teachers.standard.terms: every term is left out"),
        (
            "teachers.standard.terms",
            {"cross_entropy": 3},
            "teachers.standard.terms.cross_entropy: should be a valid dict",
        ),
        (
            "teachers.standard.training",
            {"epochs": 0},
            "teachers.standard.training.epochs: should be greater than or equal",
        ),
        ("students.kd.training", {"epoch": 1}, "students.kd.training: unknown key 'epoch'; did you mean epochs"),
        (
            "teachers.early.from",
            "standrad",
            "teachers.early.from: unknown trained teacher 'standrad'; did you mean stand",
        ),
        (
            "teachers.early.from",
            "old",
            "teachers.early.from: old is a file, wanted a teacher trained in this study",
        ),
        ("teachers.early.after", 11, "teachers.early.after: 11 is past the end of 10 epochs"),
        ("teachers.early.after", 2.5, "teachers.early.after: 2.5 is neither a share of the run below 1 nor a whole"),
        ("teachers.early.after", 0, "teachers.early.after: should be greater than 0, got 0"),
        (
            "students.hot.teachers",
            ["sotacher"],
            "students.hot.teachers: unknown teacher 'sotacher'; did you mean soteache",
        ),
        ("students.alone.teachers", ["standard"], "students.alone.teachers: no term of the loss reads a teacher"),
        ("teachers.a-b", {"model": "resnet8"}, "teachers.a-b: String should match pattern"),
        ("training.epochs", 0, "training.epochs: should be greater than or equal to 1, got 0"),
        ("logging", ["tensorbord"], "logging.0: should be 'tensorboard', 'wandb' or 'mlflow', got 'tensorbord'"),
        ("teachers", [], "teachers: should be a valid dictionary, got []"),
        (
            "teachers.standard",
            "wrn_16_2",
            "teachers.standard: should be a valid dictionary or instance of TrainedTeacher",
        ),
    ],
)
def test_a_study_says_in_one_line_what_came_and_what_was_wanted(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(StudyConfig, _with(path, value))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": TREE["data"]}, "a study needs at least one teacher or student, got none"),
        (
            {"data": TREE["data"], "students": {"kd": {"model": "resnet8"}}},
            "students.kd: the method kd needs a teacher, and the study names none",
        ),
        ({"students": {"alone": {"model": "resnet8", "method": "alone"}}}, "data: missing, and needed"),
    ],
)
def test_a_study_that_lacks_something_says_what(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(StudyConfig, tree)
    assert str(caught.value) == message


def test_the_same_study_has_no_differences() -> None:
    other = _study(description="other words", baseline=None, logging=["wandb"])
    assert differences(_study(), other) == []


@pytest.mark.parametrize(
    "over",
    [
        {"seeds": [1, 0, 2]},
        {"teachers": TREE["teachers"] | {"new": {"model": "resnet8"}}},
        {"students": TREE["students"] | {"new": {"model": "resnet20", "method": "kd"}}},
    ],
)
def test_a_study_may_grow(over: dict[str, Any]) -> None:
    assert differences(_study(), _study(**over)) == []


def test_a_study_of_teachers_alone_may_get_students() -> None:
    teachers = _study(students={}, baseline=None)
    assert differences(teachers, _study(baseline=None)) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("training.epochs", 11, "training.epochs: 10 in the folder, 11 now"),
        ("seeds", [0], "seeds: [0, 1] in the folder, [0] now"),
        ("data.source", "fashion_mnist", "data.source: fashion_mnist_small in the folder, fashion_mnist now"),
        ("students.hot.model", "resnet20", "students.hot.model: resnet8 in the folder, resnet20 now"),
        (
            "teachers.standard.terms",
            {"lipschitz": {"weight": 2}},
            "teachers.standard.terms.lipschitz.weight: nothing in the ",
        ),
        (
            "teachers.standard.terms",
            {"lipschitz": {}},
            "teachers.standard.terms.lipschitz: nothing in the folder, {} now",
        ),
        (
            "teachers.soteacher.terms",
            {},
            "teachers.soteacher.terms.lipschitz.weight: 0.0001 in the folder, nothing now",
        ),
        ("teachers.early.after", 0.7, "teachers.early.after: 0.5 in the folder, 0.7 now"),
    ],
)
def test_differences_name_the_key_and_both_values(path: str, value: Any, line: str) -> None:
    found = differences(_study(), parse(StudyConfig, _with(path, value)))
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_teacher_that_is_gone_is_a_difference() -> None:
    tree = _with("teachers.old", None)
    del tree["teachers"]["old"]
    found = differences(_study(), parse(StudyConfig, tree))
    assert found[0] == "teachers.old.file: old/model.safetensors in the folder, nothing now"


def test_another_optimiser_is_a_difference() -> None:
    new = parse(StudyConfig, _with("training.optimizer", {"name": "adamw", "learning_rate": 0.1}))
    assert "training.optimizer.name: sgd in the folder, adamw now" in differences(_study(), new)


def test_the_default_method_of_a_student_is_kd() -> None:
    assert terms_of(Student(model="x")).keys() == {"cross_entropy", "kd"}


@pytest.mark.parametrize(
    ("method", "terms", "message"),
    [
        ("sskd", {"sskd": {"stage": "preparation"}}, "sskd goes on in the training from what sskd_head makes in the"),
        ("sskd", {"sskd_head": None}, "sskd goes on in the training from what sskd_head makes"),
        ("factor_transfer", {"factor_transfer": {"stage": "preparation"}}, "factor_transfer goes on in the training"),
        ("factor_transfer", {"paraphraser": {"stage": "training"}}, "add paraphraser with stage: preparation, and"),
        ("factor_transfer", {"factor_transfer": None}, "nothing takes over what paraphraser makes; add factor_transf"),
        ("kd", {"sskd_head": {"stage": "preparation"}}, "nothing takes over what sskd_head makes; add sskd, or leave"),
        ("kd", {"paraphraser": {}}, "nothing takes over what paraphraser makes; add factor_transfer, or leave"),
        ("fsp", {"activation_boundary": {"stage": "preparation"}}, "prepares the network alone, and "),
        ("kd", {"kd": None, "cross_entropy": {"stage": "preparation"}}, "every term is of the preparation"),
    ],
)
def test_stages_that_contradict_each_other_are_refused(method: str, terms: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        terms_of(Student(model="resnet8", method=method, terms=terms))
