import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from soteacher.errors import InputError
from soteacher.train.checkpoint import Checkpoint, Position

TERMS = {"cross_entropy": {}, "consistency": {}}


def _parts(training: Any) -> dict[str, Any]:
    trainee = training.trainee
    return {"network": trainee.network, "optimizer": trainee.optimizer.optimizer, "terms": trainee.terms}


def test_save_and_load_are_inverse(make_training) -> None:
    training = make_training(terms=TERMS)
    training.run()
    position = Position(epoch=1, step=2, history=[{"epoch": 0, "loss": 0.1 + 0.2}], sums=[1 / 3], seconds=0.7)
    training.checkpoint.save(position, **_parts(training))
    other = make_training(terms=TERMS, seed=1)
    assert other.checkpoint.load(**_parts(other)) == position
    assert other.state().keys() == training.state().keys()
    for name, value in training.state().items():
        assert torch.equal(other.state()[name], value), name


def test_load_returns_none_where_nothing_was_saved(make_training) -> None:
    training = make_training(terms=TERMS)
    assert training.checkpoint.load(**_parts(training)) is None
    assert training.checkpoint.history() == []


def test_load_refuses_the_state_of_another_training(make_training) -> None:
    make_training(terms=TERMS).run()
    other = make_training(terms=TERMS, fingerprint="another")
    with pytest.raises(InputError, match="belongs to a training with other settings"):
        other.run()


@pytest.mark.parametrize("content", [b"", b"no tensors at all", None])
def test_load_refuses_a_damaged_file(make_training, content: bytes | None) -> None:
    training = make_training(terms=TERMS)
    training.run()
    path = training.checkpoint.path
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(
        InputError, match=r"is no readable training state .*; remove it to train this network"
    ) as caught:
        make_training(terms=TERMS).run()
    assert "\n" not in str(caught.value)
    assert training.checkpoint.history() == []


def test_load_refuses_tensors_of_somebody_else(make_training) -> None:
    from safetensors.torch import save_file

    training = make_training(terms=TERMS)
    training.checkpoint.folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, training.checkpoint.path)
    with pytest.raises(InputError, match="is no readable training state"):
        training.run()


def test_the_state_is_tensors_and_json_and_nothing_else(make_training) -> None:
    training = make_training(terms=TERMS)
    history = training.run()
    with safe_open(training.checkpoint.path, framework="pt") as file:
        facts, names = json.loads(file.metadata()["soteacher"]), set(file.keys())
    assert facts["fingerprint"] == "this one"
    assert facts["history"] == training.checkpoint.history() == history
    assert {"network.head.weight", "network.norm.running_var", "objective.consistency.average"} <= names
    assert "optimizer.0.momentum_buffer" in names


def test_momentum_comes_back_in_the_memory_layout_of_its_weight(make_training) -> None:
    training = make_training(terms=TERMS, channels_last=True)
    training.run()
    other = make_training(terms=TERMS, channels_last=True)
    other.checkpoint.load(**_parts(other))
    for made in (training, other):
        optimizer = made.trainee.optimizer.optimizer
        for parameter in optimizer.param_groups[0]["params"]:
            assert optimizer.state[parameter]["momentum_buffer"].stride() == parameter.stride()


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    checkpoint = Checkpoint(tmp_path / "resume", "x")
    checkpoint.save(Position(), network=network, optimizer=optimizer, terms=())
    assert checkpoint.load(network=network, optimizer=optimizer, terms=()) == Position()


def test_a_failed_write_leaves_the_earlier_state(make_training, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(terms=TERMS)
    training.run()
    before = training.checkpoint.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        training.checkpoint.save(Position(epoch=2), **_parts(training))
    assert training.checkpoint.path.read_bytes() == before
    assert [path.name for path in training.checkpoint.folder.iterdir()] == ["state.safetensors"]


def test_remove_takes_the_folder_with_it(make_training) -> None:
    training = make_training(terms=TERMS)
    training.run()
    training.checkpoint.remove()
    assert not training.checkpoint.folder.exists()
    training.checkpoint.remove()


def test_remove_leaves_what_others_put_there(make_training) -> None:
    training = make_training(terms=TERMS)
    training.run()
    (training.checkpoint.folder / "note.txt").write_text("mine")
    training.checkpoint.remove()
    assert [path.name for path in training.checkpoint.folder.iterdir()] == ["note.txt"]
