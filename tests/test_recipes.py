from pathlib import Path
from typing import Any

import pytest
import yaml

from soteacher import published_settings, recipes
from soteacher.config import StudyConfig, TrainedTeacher, terms_of
from soteacher.errors import InputError
from soteacher.models.zoo import check_network
from soteacher.objectives import METHODS
from soteacher.published_settings import Changes, MethodRecipe, method_recipe, method_recipe_names, pair_names
from soteacher.recipes import DEFAULT_PAIR, read_study, recipe_description, recipe_names, recipe_text
from soteacher.series import read_plan
from soteacher.settings import merge

DISTILLING = [name for name, method in METHODS.items() if method.role == "student" and name != "alone"]
SLOW_LEARNERS = ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_study_that_says_what_it_is_for(name: str) -> None:
    study = read_plan(name)
    assert study.name == name
    assert recipe_description(name) == study.description.strip()
    assert recipe_description(name).endswith(".")


def test_there_is_a_quickstart() -> None:
    assert "quickstart" in recipe_names()


def test_a_recipe_shown_and_run_as_a_file_is_the_same_study(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("quickstart"))
    assert read_study(path) == read_study(str(path)) == read_study("quickstart")


def test_settings_are_laid_over_a_recipe() -> None:
    study = read_study("quickstart", ["training.epochs=3", "training.optimizer.learning_rate=1e-3", "seeds=[5]"])
    assert (study.training.epochs, study.training.optimizer.learning_rate, study.seeds) == (3, 0.001, (5,))


def test_settings_are_laid_over_a_tree_and_leave_it_alone(tiny_tree: Any) -> None:
    tree = tiny_tree()
    study = read_study(tree, ["training.epochs=3", "teachers.soteacher.terms.lipschitz=null"])
    assert isinstance(study, StudyConfig)
    assert study.training.epochs == 3
    assert tree == tiny_tree()


def test_the_thirteen_pairs_are_networks_that_are_known() -> None:
    assert len(set(pair_names())) == 13
    assert DEFAULT_PAIR in pair_names()
    for pair in pair_names():
        for network in pair.split("-"):
            check_network(network)


@pytest.mark.parametrize("name", DISTILLING)
def test_every_method_is_a_study_on_every_pair_that_suits_it(name: str) -> None:
    assert name in method_recipe_names(), f"recipes/methods/{name}.yaml is missing"
    recipe = method_recipe(name)
    for pair in set(pair_names()) - set(recipe.unsuitable):
        study = read_study(name, pair=pair)
        teacher, network = pair.split("-")
        assert study.name == f"cifar100-{name}-{pair}"
        assert study.baseline == ("alone" if name == "kd" else "standard-kd")
        assert study.teachers == {"standard": TrainedTeacher(model=teacher, method="standard")}
        assert list(study.students) == list(dict.fromkeys(["alone", "kd", name]))
        assert {(student.model, student.teachers) for student in study.students.values()} == {(network, None)}
        assert {key: student.method for key, student in study.students.items()} == {
            key: key for key in study.students
        }  # an arm is called as its method
        for student in (study.students["alone"], study.students["kd"]):
            rate = 0.01 if network in SLOW_LEARNERS else 0.05
            assert study.training_of(student).optimizer.learning_rate == rate


@pytest.mark.parametrize("name", DISTILLING)
def test_what_a_methods_recipe_says_arrives_in_the_students_terms_and_training(name: str) -> None:
    recipe, method = method_recipe(name), METHODS[name]
    for pair in set(pair_names()) - set(recipe.unsuitable):
        student = read_study(name, pair=pair).students[name]
        own = recipe.pairs.get(pair, Changes())
        terms = {key: config.model_dump(mode="json") for key, config in terms_of(student).items()}
        wanted = merge(merge(method.terms, recipe.student.terms), own.terms)
        assert terms.keys() == {key for key, settings in wanted.items() if settings is not None}
        assert {key: merge(terms[key], settings) for key, settings in wanted.items() if settings is not None} == terms
        training = merge(merge(method.training, recipe.student.training), own.training)
        if pair.split("-")[1] in SLOW_LEARNERS and "optimizer" not in own.training:
            training = merge(training, {"optimizer": {"learning_rate": 0.01}})
        assert merge(student.training, training) == student.training


@pytest.mark.parametrize("name", method_recipe_names())
def test_every_methods_recipe_is_of_its_own_method_and_names_known_pairs(name: str) -> None:
    recipe = method_recipe(name)
    assert recipe.method == name
    assert name not in recipe_names()
    assert {*recipe.pairs, *recipe.unsuitable} <= set(pair_names())
    assert not set(recipe.pairs) & set(recipe.unsuitable)
    for text in (recipe.source, recipe.protocol, recipe.unchecked, *recipe.unsuitable.values()):
        assert not text.rstrip().endswith(".")
    assert recipe.source in recipe_description(name)


def test_dkd_takes_the_authors_weights_by_the_pair() -> None:
    weights = {}
    for pair in pair_names():
        terms = terms_of(read_study("dkd", pair=pair).students["dkd"])
        weights[pair] = terms["dkd"].model_dump()["non_target_weight"]
    assert (weights["wrn_40_2-wrn_16_2"], weights["vgg13-vgg8"], weights["resnet32x4-resnet8x4"]) == (6, 6, 8)
    assert (weights["resnet56-resnet20"], weights["resnet110-resnet32"], weights["wrn_40_2-shufflenet_v1"]) == (2, 2, 8)


def test_a_pairs_settings_go_over_those_of_the_network_and_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = MethodRecipe(
        method="kd_standardized",
        source="nowhere",
        protocol="none",
        student=Changes(
            terms={"cross_entropy": None, "kd": {"temperature": 3.0}},
            training={"epochs": 480, "optimizer": {"learning_rate": 0.025}},
        ),
        pairs={"vgg13-mobilenet_v2": Changes(training={"optimizer": {"learning_rate": 0.0025}})},
    )
    monkeypatch.setattr(recipes, "method_recipe", lambda _: recipe)
    monkeypatch.setattr(
        published_settings, "method_recipe", lambda name: recipe if name == recipe.method else method_recipe(name)
    )
    rates = {}
    for pair in ("vgg13-vgg8", "resnet32x4-shufflenet_v1", "vgg13-mobilenet_v2"):
        study = read_study(recipe.method, pair=pair)
        student = study.students[recipe.method]
        rates[pair] = study.training_of(student).optimizer.learning_rate
        assert study.training_of(student).epochs == 480
        assert list(terms_of(student)) == ["kd"]
        assert (terms_of(student)["kd"].weight, terms_of(student)["kd"].model_dump()["temperature"]) == (9, 3)
        assert study.training_of(study.students["kd"]).epochs == 240
    assert list(rates.values()) == [0.025, 0.01, 0.0025]


def test_a_methods_recipe_is_shown_whole_and_is_the_same_study_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("kd_standardized", "vgg13-vgg8"))
    study = read_study(path)
    assert study == read_study("kd_standardized", pair="vgg13-vgg8")
    assert study.students["kd_standardized"].terms == {
        "cross_entropy": {"weight": 0.1},
        "kd": {"weight": 9.0, "temperature": 3.0, "standardize": True},
    }
    assert study.training == read_study("cifar100-wrn40_2-wrn16_2").training
    assert "&" not in path.read_text()
    assert all(len(line) <= 140 for line in path.read_text().splitlines())


def test_a_methods_recipe_takes_settings_and_a_pair_where_none_is_named() -> None:
    study = read_study("kd", ["training.epochs=24", "students.kd.terms.kd.temperature=2"])
    assert study.name == f"cifar100-kd-{DEFAULT_PAIR}"
    assert (study.training.epochs, terms_of(study.students["kd"])["kd"].model_dump()["temperature"]) == (24, 2)
    assert recipe_text("kd") == recipe_text("kd", DEFAULT_PAIR)


@pytest.mark.parametrize(
    ("source", "pair", "message"),
    [
        ("kd", "vgg13-vgg9", "unknown pair 'vgg13-vgg9'; did you mean vgg13-vgg8"),
        ("kkd", "vgg13-vgg8", "unknown recipe 'kkd'; did you mean"),
        ("fsp", "resnet50-vgg8", "fsp does not suit the pair resnet50-vgg8: its flow matrices want stages of equal"),
        ("quickstart", "vgg13-vgg8", "quickstart is a whole study with networks of its own, got the pair vgg13-vgg8"),
        ("./mine.yaml", "vgg13-vgg8", "mine.yaml is a whole study with networks of its own, got the pair vgg13-vgg8"),
        ({"data": {}}, "vgg13-vgg8", "the tree of settings is a whole study with networks of its own, got the pair"),
    ],
)
def test_a_pair_that_cannot_be_had_is_told_in_one_line(source: Any, pair: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(source, pair=pair)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("quickstrat", [], "unknown recipe 'quickstrat'; did you mean quickstart?"),
        ("../quickstart", [], "../quickstart: no readable study: No such file or directory"),
        ("nothing.yaml", [], "nothing.yaml: no readable study: No such file or directory"),
        ("quickstart", ["training.epoch=3"], "recipe quickstart: training: unknown key 'epoch'; did you mean epochs"),
        (
            "quickstart",
            ["training.epochs=0"],
            "recipe quickstart: training.epochs: should be greater than or equal to 1",
        ),
        ("quickstart", ["epochs"], "--set wants path.to.field=value, got 'epochs'"),
        ("quickstart", ["a..b=1"], "recipe quickstart: unknown key 'a'; known:"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(source: str, settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(source, settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [1\nb: 2", "no readable YAML in line 2"),
        (b"\xff\xfe\xff", "no readable study: 'utf-8' codec"),
        (b"- 1", "a study is a table of settings, got [1]"),
        (yaml.safe_dump({"data": {"source": "npz"}}).encode(), "data.path: missing, and needed"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_study(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable study: Is a directory"):
        read_study(tmp_path)


def test_methods_cpu_has_every_method() -> None:
    study = read_study("methods-cpu")
    students = [name for name, method in METHODS.items() if method.role == "student"]
    assert {name: student.method for name, student in study.students.items()} == {name: name for name in students}
