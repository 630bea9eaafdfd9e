import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from soteacher.data.cifar import Cifar10Config, Cifar100Config, read_record
from soteacher.errors import InputError


def _record(count: int, num_classes: int, key: str, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
        key: [i % num_classes for i in range(count)],
    }


def _write(path: Path, record: object, protocol: int = 4) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(record, protocol=protocol))


@pytest.fixture
def cifar100(tmp_path):
    """Give a root with a tiny CIFAR-100 of three classes."""
    folder = tmp_path / "cifar-100-python"
    _write(folder / "meta", {"fine_label_names": ["apple", "bear", "cup"], "coarse_label_names": ["x", "y"]})
    _write(folder / "train", {**_record(12, 3, "fine_labels"), "coarse_labels": [0] * 12})
    _write(folder / "test", _record(6, 3, "fine_labels", seed=1))
    return tmp_path


def _refused(root: Path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        Cifar100Config(**settings).load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _python2_pickle(data: bytes, labels: list[int]) -> bytes:
    """Return what Python 2 with numpy 1 wrote for a dictionary of uint8 ``[n, 3072]`` data and labels."""
    rows = struct.pack("<B", len(data) // 3072)
    parts = [b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"]
    parts.append(b"(K\x01K" + rows + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R")
    parts.append(
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    )
    parts.append(b"U\x0bfine_labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu.")
    return b"".join(parts)


def test_cifar100_is_read_whole(cifar100):
    data = Cifar100Config().load(cifar100)
    assert (data.name, data.num_classes, data.in_channels, data.image_size) == ("cifar100", 3, 3, 32)
    assert data.class_names == ("apple", "bear", "cup")
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    wanted = _record(12, 3, "fine_labels")["data"].reshape(12, 3, 32, 32)
    assert torch.equal(data.train.images, torch.from_numpy(wanted))
    assert data.test.num_examples == 6
    assert data.mean == (0.5071, 0.4867, 0.4408)


def test_cifar10_joins_its_five_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    _write(folder / "batches.meta", {b"label_names": [b"cat", b"dog"]})
    for number in range(1, 6):
        _write(folder / f"data_batch_{number}", _record(4, 2, "labels", seed=number))
    _write(folder / "test_batch", _record(4, 2, "labels"))
    data = Cifar10Config(train_examples=10).load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert torch.bincount(data.train.labels).tolist() == [5, 5]
    whole = Cifar10Config().load(tmp_path)
    assert whole.train.num_examples == 20
    third = torch.from_numpy(_record(4, 2, "labels", seed=3)["data"]).view(4, 3, 32, 32)
    assert torch.equal(whole.train.images[8:12], third)
    assert whole.checksum != data.checksum


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_records_of_any_protocol_and_key_type_are_read(tmp_path, protocol):
    record = {key.encode(): value for key, value in _record(3, 3, "fine_labels").items()}
    _write(tmp_path / "x", record, protocol)
    back = read_record(tmp_path / "x")
    assert set(back) == {"data", "fine_labels"}
    assert np.array_equal(back["data"], record[b"data"])


def test_records_written_by_python_2_are_read(tmp_path):
    data = bytes(range(256)) * 24
    (tmp_path / "x").write_bytes(_python2_pickle(data, [4, 7]))
    back = read_record(tmp_path / "x")
    assert back["data"].tobytes() == data
    assert back["data"].shape == (2, 3072)
    assert back["fine_labels"] == [4, 7]


class _Program:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_a_pickle_that_would_run_a_program_is_refused(cifar100, monkeypatch):
    monkeypatch.chdir(cifar100)
    _write(cifar100 / "cifar-100-python" / "train", {"data": _Program()})
    assert ".system; wanted numpy arrays and plain values only" in _refused(cifar100)
    assert not (cifar100 / "hacked").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": np.zeros((12, 3000), np.uint8)}, r"no uint8 array of shape \[N, 3072\]"),
        ({"data": np.zeros((12, 3072), np.float32)}, "no uint8 array"),
        ({"fine_labels": [0] * 11}, "no list of 12 labels"),
        ({"fine_labels": [0] * 11 + [3]}, "has label 3; wanted integers from 0 to 2"),
        ({"fine_labels": [0] * 11 + [-1]}, "has label -1"),
        ({"fine_labels": [0] * 11 + [1.5]}, "has label 1.5"),
    ],
)
def test_wrong_entries_are_refused(cifar100, change, words):
    _write(cifar100 / "cifar-100-python" / "train", {**_record(12, 3, "fine_labels"), **change})
    with pytest.raises(InputError, match=words):
        Cifar100Config().load(cifar100)


def test_damaged_files_are_refused(cifar100):
    train = cifar100 / "cifar-100-python" / "train"
    train.write_bytes(train.read_bytes()[:500])
    assert f"cannot read CIFAR file {train}: " in _refused(cifar100)
    _write(train, [1, 2])
    assert "it holds a list, wanted a dictionary" in _refused(cifar100)
    _write(train, {"data": 1})
    assert "has no entry 'fine_labels'; it has data" in _refused(cifar100)
    train.unlink()
    assert f"file {train} is missing" in _refused(cifar100)


def test_more_examples_than_there_are_is_refused(cifar100):
    assert _refused(cifar100, train_examples=13) == "train_examples is 13, but there are 12"
    assert _refused(cifar100, test_examples=7) == "test_examples is 7, but there are 6"


def test_mean_and_std_can_be_given_and_must_fit(cifar100):
    data = Cifar100Config(mean=(0.5, 0.5, 0.5)).load(cifar100)
    assert data.mean == (0.5, 0.5, 0.5)
    assert data.std == (0.2675, 0.2565, 0.2761)
    assert "std has 1 values; images of cifar100 have 3 channels" in _refused(cifar100, std=(0.5,))


@pytest.mark.slow
@pytest.mark.parametrize("config", [Cifar10Config(), Cifar100Config()], ids=lambda config: config.source)
def test_the_real_set_has_its_known_statistics(config):
    root = Path(os.environ.get("SOTEACHER_DATA", "/nonexistent"))
    if not any((root / name).is_dir() for name in ("cifar-100-python", "cifar-10-batches-py")):
        pytest.skip("SOTEACHER_DATA does not name a folder with the CIFAR archives")
    data = config.load(root)
    assert torch.bincount(data.train.labels).unique().tolist() == [50_000 // data.num_classes]
    assert torch.bincount(data.test.labels).unique().tolist() == [10_000 // data.num_classes]
    measured = data.train.images.float().div(255).mean((0, 2, 3))
    torch.testing.assert_close(measured, torch.tensor(data.mean), atol=3e-4, rtol=0)
