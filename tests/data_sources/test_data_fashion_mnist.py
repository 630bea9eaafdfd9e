import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from soteacher.data import fashion_mnist
from soteacher.data.dataset import class_balanced_subset
from soteacher.data.embedded import PATH, FashionMnistSmallConfig
from soteacher.data.fashion_mnist import FashionMnistConfig, obtain_files, read_idx
from soteacher.errors import InputError


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def _pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


@pytest.fixture(params=["plain", "gz"])
def root(request, tmp_path, monkeypatch):
    """Give a root with a tiny Fashion-MNIST."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", _pixels(count)), (f"{stem}-labels-idx1-ubyte", labels)):
            if request.param == "gz":
                content = gzip.compress(_idx(array))
                (raw / f"{name}.gz").write_bytes(content)
                monkeypatch.setitem(fashion_mnist._MD5, name, hashlib.md5(content).hexdigest())
            else:
                (raw / name).write_bytes(_idx(array))
    return tmp_path


def test_files_are_read_whole(root):
    data = FashionMnistConfig().load(root)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(_pixels(20)))
    assert data.train.labels.tolist() == [*range(10)] * 2
    assert data.train.labels.dtype == torch.int64
    assert data.test.num_examples == 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_idx(np.zeros((2, 3), np.uint8)), "no IDX file of 1-dimensional bytes: it begins with 00000802"),
        (_idx(np.zeros(9, np.uint8))[:-1], "holds 8 values; its header states 9"),
        (b"\0\0", "it begins with 0000"),
        (_idx(np.zeros(0, np.uint8)), "holds 0 values"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_idx(tmp_path / "x", dimensions=1)


@pytest.mark.parametrize("content", [b"plain", gzip.compress(_idx(np.arange(200, dtype=np.uint8)))[:60]])
def test_damaged_gz_files_are_refused(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x.gz: "):
        read_idx(tmp_path / "x.gz", dimensions=1)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("train-labels-idx1-ubyte", np.full(20, 10, np.uint8), "has label 10; wanted 0 to 9"),
        ("train-labels-idx1-ubyte", np.zeros(19, np.uint8), "has 19 labels for 20 images"),
        ("train-images-idx3-ubyte", np.zeros((20, 27, 28), np.uint8), "have 27x28 pixels; wanted 28x28"),
    ],
)
def test_files_that_do_not_fit_are_refused(root, name, array, words):
    (root / "FashionMNIST" / "raw" / name).write_bytes(_idx(array))  # a plain file goes before a compressed one
    with pytest.raises(InputError, match=words):
        FashionMnistConfig().load(root)


@pytest.mark.parametrize("root", ["gz"], indirect=True)
def test_a_compressed_file_with_another_checksum_is_refused(root):
    archive = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = gzip.compress(_idx(_pixels(20)[::-1].copy()))  # whole, and of the right shape
    archive.write_bytes(content)
    with pytest.raises(InputError) as caught:
        FashionMnistConfig().load(root)
    assert str(caught.value).startswith(f"{archive} is damaged: its checksum is {hashlib.md5(content).hexdigest()}")
    (archive.parent / "train-images-idx3-ubyte").write_bytes(_idx(_pixels(20)))  # goes before it
    FashionMnistConfig().load(root)


def test_missing_files_are_asked_for(root):
    raw = root / "FashionMNIST" / "raw"
    obtain_files(raw, url="http://127.0.0.1:1/")  # nothing is missing yet
    next(raw.glob("t10k-labels*")).unlink()
    with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:1/t10k-labels-idx1-ubyte.gz: .*refused"):
        obtain_files(raw, url="http://127.0.0.1:1/")


def test_the_embedded_part_is_balanced_and_small(tmp_path):
    data = FashionMnistSmallConfig().load(tmp_path)
    assert torch.bincount(data.train.labels).tolist() == [600] * 10
    assert torch.bincount(data.test.labels).tolist() == [200] * 10
    assert data.train.images.shape == (6000, 1, 28, 28)
    assert data.class_names[9] == "Ankle boot"
    assert data.checksum == "c54e3595202606de07a8981ac4ba735e"
    mean = float((data.train.images / 255).mean())
    assert mean == pytest.approx(data.mean[0], abs=5e-3)
    assert PATH.stat().st_size <= 5_000_000
    assert "Zalando" in (PATH.parent / "LICENSE").read_text(encoding="utf-8")


def test_the_embedded_part_can_be_cut_down(tmp_path):
    data = FashionMnistSmallConfig(train_examples=100, test_examples=50).load(tmp_path)
    assert torch.bincount(data.train.labels).tolist() == [10] * 10
    assert torch.bincount(data.test.labels).tolist() == [5] * 10


def test_the_embedded_part_is_that_of_the_real_set(tmp_path):
    root = Path(os.environ.get("SOTEACHER_DATA", "/nonexistent"))
    if not (root / "FashionMNIST" / "raw").is_dir():
        pytest.skip("SOTEACHER_DATA does not name a folder with Fashion-MNIST")
    whole, part = FashionMnistConfig().load(root), FashionMnistSmallConfig().load(tmp_path)
    for real, small in ((whole.train, part.train), (whole.test, part.test)):
        rows = class_balanced_subset(real.labels, small.num_examples, 0)
        assert torch.equal(real.images[rows], small.images)
        assert torch.equal(real.labels[rows], small.labels)
