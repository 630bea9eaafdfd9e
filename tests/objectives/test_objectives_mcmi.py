from typing import Any

import pytest

from soteacher.objective import Method
from soteacher.objectives.teacher import mcmi, mcmi_frozen
from soteacher.objectives.teacher.class_information import ClassInformationConfig
from soteacher.objectives.teacher.class_information_frozen import ClassInformationFrozenConfig
from soteacher.train.config import TrainingConfig

METHODS = (mcmi.METHOD, mcmi_frozen.METHOD)


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_it_fine_tunes_a_teacher_as_the_authors_do(method: Method) -> None:
    assert (method.role, method.fine_tunes) == ("teacher", True)
    training = TrainingConfig.model_validate(method.training)
    assert training.epochs == 20
    assert (training.optimizer.name, training.optimizer.learning_rate, training.schedule.name) == (
        "sgd",
        0.05,
        "cosine",
    )
    assert (training.optimizer.weight_decay, training.batch_size) == (5e-4, 64)


def test_the_variants_differ_in_their_centroids_only() -> None:
    running, frozen = METHODS
    assert (running.name, frozen.name) == ("mcmi", "mcmi_frozen")
    assert list(running.terms) == ["cross_entropy", "class_information"]
    assert list(frozen.terms) == ["cross_entropy", "class_information_frozen"]
    assert running.terms["class_information"] == frozen.terms["class_information_frozen"] == {"weight": 0.25}
    assert running.training == frozen.training
    assert ClassInformationConfig(**running.terms["class_information"]).weight == 0.25
    assert ClassInformationFrozenConfig(**frozen.terms["class_information_frozen"]).weight == 0.25
