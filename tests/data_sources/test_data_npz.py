import numpy as np
import pytest
import torch

from soteacher.data.npz import NpzConfig
from soteacher.errors import InputError


def _arrays(**changes) -> dict:
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": random.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def _load(tmp_path, settings=None, **changes):
    np.savez(tmp_path / "mine.npz", **_arrays(**changes))
    return NpzConfig(path=tmp_path / "mine.npz", **(settings or {})).load(tmp_path)


def test_colour_images_are_read_with_channels_first(tmp_path):
    data = _load(tmp_path)
    assert (data.name, data.in_channels, data.image_size, data.num_classes) == ("mine", 3, 6, 3)
    assert torch.equal(data.train.images, torch.from_numpy(_arrays()["train_images"]).permute(0, 3, 1, 2))
    assert data.train.labels.dtype == torch.int64
    assert data.class_names == ("0", "1", "2")
    scaled = _arrays()["train_images"] / 255
    assert data.mean == pytest.approx(scaled.mean((0, 1, 2)))
    assert data.std == pytest.approx(scaled.std((0, 1, 2)))


def test_grey_float_images_are_kept_as_float32(tmp_path):
    random = np.random.default_rng(0)
    images = {name: random.random((count, 5, 5)) for name, count in (("train_images", 12), ("test_images", 6))}
    data = _load(tmp_path, **images)
    assert data.train.images.dtype == torch.float32
    assert data.train.images.shape == (12, 1, 5, 5)
    assert data.std[0] == pytest.approx(images["train_images"].std(), rel=1e-5)


@pytest.mark.parametrize("key", ["label_names", "class_names"])
@pytest.mark.parametrize("kind", [str, bytes])
def test_classes_can_be_named(tmp_path, key, kind):
    names = np.array(["a", "b", "c", "d"]).astype("U" if kind is str else "S")
    assert _load(tmp_path, **{key: names}).class_names == ("a", "b", "c", "d")


def test_mean_and_std_are_of_the_examples_in_use(tmp_path):
    data = _load(tmp_path, {"train_examples": 3})
    assert data.train.num_examples == 3
    assert data.mean == pytest.approx((data.train.images.double() / 255).mean((0, 2, 3)).tolist())


def test_known_distributions_and_clean_labels_come_with_the_images(tmp_path):
    shares = np.random.default_rng(1).dirichlet(np.ones(3), 12)
    clean = np.repeat(np.arange(3), 4)
    data = _load(
        tmp_path,
        train_label_distribution=shares,
        test_label_distribution=shares[:6].astype(np.float32),
        train_clean_labels=clean,
    )
    assert data.train.label_distribution.dtype == data.test.label_distribution.dtype == torch.float32
    np.testing.assert_array_equal(data.train.label_distribution, shares.astype(np.float32))
    np.testing.assert_array_equal(data.test.label_distribution, shares[:6].astype(np.float32))
    assert data.train.clean_labels.tolist() == clean.tolist()
    assert data.test.clean_labels is None
    assert data.train.labels.tolist() == _arrays()["train_labels"].tolist()


def test_what_is_not_known_is_none(tmp_path):
    data = _load(tmp_path)
    for split in (data.train, data.test):
        assert split.label_distribution is None
        assert split.clean_labels is None


def test_a_subset_is_balanced_by_the_clean_labels(tmp_path):
    noisy, clean = np.array([1] * 9 + [0, 2, 2]), np.arange(12) % 3
    shares = np.eye(3)[clean]
    settings = {"train_examples": 6}
    part = _load(tmp_path, settings, train_labels=noisy, train_clean_labels=clean, train_label_distribution=shares)
    assert part.train.clean_labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(part.train.label_distribution.argmax(1), part.train.clean_labels)
    assert torch.equal(part.train.images, _load(tmp_path, settings).train.images)


NAN = np.full((12, 6, 6), 0.5)
NAN[4, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, "it has no array test_labels; it has train_images, train_labels, test_images"),
        ({"train_images": NAN}, "train_images of .* has values that are not finite"),
        ({"train_images": np.full((12, 6, 6), np.inf)}, "train_images of .* has values that are not finite"),
        ({"test_images": np.full((6, 6, 6), 1.5)}, "test_images of .* ranges from 1.5 to 1.5; wanted 0 to 1"),
        ({"train_images": np.zeros((12, 6, 6), np.int64)}, r"int64 of shape \[12, 6, 6\]; wanted uint8"),
        ({"train_images": np.zeros((12, 3, 6, 6), np.uint8)}, r"uint8 of shape \[12, 3, 6, 6\]; wanted \[N, H, W\]"),
        ({"train_images": np.zeros((12, 6, 6, 4), np.uint8)}, "of 1 or 3 channels"),
        ({"train_images": np.zeros((0, 6, 6), np.uint8)}, r"shape \[0, 6, 6\]"),
        ({"train_images": np.zeros((12, 36), np.uint8)}, r"shape \[12, 36\]"),
        ({"test_images": np.ones((6, 7, 7, 3), np.uint8)}, "differ between the splits: training 3x6x6, test 3x7x7"),
        ({"train_labels": np.arange(11) % 3}, "train_labels of .* has 11 labels for 12 images"),
        ({"train_labels": np.arange(12) % 3 + 0.0}, r"float64 of shape \[12\]; wanted integers of shape \[N\]"),
        ({"train_labels": np.arange(12) % 3 - 1}, "train_labels of .* has label -1"),
        ({"train_labels": np.zeros((12, 1), int)}, r"int64 of shape \[12, 1\]"),
        ({"train_labels": np.arange(12) % 3 * 2}, "train_labels of .* has no example of class 1 among 0 to 4"),
        ({"train_labels": np.zeros(12, int)}, "one class only"),
        (
            {"train_labels": np.ones(12, int), "class_names": np.array(["a", "b", "c"])},
            "the training images of mine are of one class only, 'b'; wanted 2 or more",
        ),
        ({"test_labels": np.full(6, 3)}, "test_labels of .* has label 3; wanted 0 to 2"),
        ({"label_names": np.array(["a", "b"])}, "train_labels of .* has label 2; wanted 0 to 1"),
        (
            {"train_label_distribution": np.full((11, 3), 1 / 3)},
            "train_label_distribution of .* has 11 rows; wanted 12",
        ),
        ({"test_label_distribution": np.full((6, 2), 0.5)}, r"float64 of shape \[6, 2\]; wanted .* shape \[N, 3\]"),
        ({"test_label_distribution": np.ones((6, 3), int)}, r"int64 of shape \[6, 3\]; wanted floating point"),
        ({"train_label_distribution": np.full((12, 3), np.inf)}, "train_label_distribution of .* not finite"),
        ({"train_label_distribution": np.full((12, 3), 0.33)}, "row 0 of train_label_.* sums to 0.99; wanted 1"),
        ({"test_label_distribution": np.tile([1.5, -0.5, 0], (6, 1))}, "test_label_.* has the value -0.5; wanted"),
        ({"train_clean_labels": np.arange(13) % 3}, "train_clean_labels of .* has 13 labels; wanted 12"),
        ({"train_clean_labels": np.arange(12) % 4}, "train_clean_labels of .* has label 3; wanted 0 to 2"),
        ({"train_clean_labels": np.zeros(12)}, r"train_clean_labels of .* is float64 of shape \[12\]; wanted integers"),
        ({"label_names": np.arange(3)}, r"label_names of .* is int64 of shape \[3\]; wanted text"),
        ({"label_names": np.array(["a", "b", "c"], object)}, "allow_pickle=False"),
        ({"train_images": np.full((12, 6, 6, 3), 9, np.uint8)}, "is constant .*; give mean and std"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        _load(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"nothing", b"", b"PK\x03\x04 cut"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x.npz: ") as caught:
        NpzConfig(path=tmp_path / "x.npz").load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(InputError, match="it holds a single array"):
        NpzConfig(path=tmp_path / "x.npy").load(tmp_path)


def test_a_compressed_file_with_a_wrong_byte_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **_arrays())
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[300] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x.npz: "):
        NpzConfig(path=tmp_path / "x.npz").load(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"npz file .*none.npz does not exist"):
        NpzConfig(path=tmp_path / "none.npz").load(tmp_path)
