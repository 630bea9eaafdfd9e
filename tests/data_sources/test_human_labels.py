import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from soteacher.data import DataSet, class_balanced_subset, human_labels
from soteacher.data.cifar import Cifar10Config
from soteacher.errors import InputError
from soteacher.settings import parse

NUM_CLASSES = 4
NUM_TRAIN = NUM_TEST = 40
BOTH = ("cifar10h", "cifar10n")
ANNOTATORS = ("random_label1", "random_label2", "random_label3")


def _write_pickle(path: Path, record: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(record))


def _batch(count: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % NUM_CLASSES).tolist()
    return {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": labels}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a root with a tiny CIFAR-10 of four classes, without anything that people said."""
    folder = tmp_path / "cifar-10-batches-py"
    _write_pickle(folder / "batches.meta", {"label_names": ["cat", "dog", "emu", "fox"]})
    for number in range(1, 6):
        _write_pickle(folder / f"data_batch_{number}", _batch(NUM_TRAIN // 5, number))
    _write_pickle(folder / "test_batch", _batch(NUM_TEST, 0))
    return tmp_path


def _judgements(test_labels: torch.Tensor) -> np.ndarray:
    """Return distributions whose largest share is that of the label."""
    shares = np.random.default_rng(1).dirichlet(np.ones(NUM_CLASSES), len(test_labels))
    return 0.45 * shares + 0.55 * np.eye(NUM_CLASSES)[test_labels.numpy()]


def _annotations(train_labels: torch.Tensor) -> dict[str, np.ndarray]:
    """Return labels of which more and more are another class."""
    random, clean = np.random.default_rng(2), train_labels.numpy()
    said = {"clean_label": clean}
    for wrong, name in enumerate((*ANNOTATORS, "aggre_label", "worse_label"), start=3):
        places = random.permutation(len(clean))[: 2 * wrong]
        said[name] = clean.copy()
        said[name][places] = (clean[places] + random.integers(1, NUM_CLASSES, len(places))) % NUM_CLASSES
    return said


@pytest.fixture
def labelled(root: Path) -> tuple[Path, np.ndarray, dict[str, np.ndarray]]:
    """Give the root with both files of arrays, and what is in them."""
    data = Cifar10Config().load(root)
    judged, said = _judgements(data.test.labels), _annotations(data.train.labels)
    np.savez(root / "cifar10h.npz", probs=judged, counts=(51 * judged).astype(np.int16))
    np.savez(root / "cifar10n.npz", **{name: labels.astype(np.uint8) for name, labels in said.items()})
    return root, judged, said


def _same_images(one: DataSet, other: DataSet) -> bool:
    return torch.equal(one.train.images, other.train.images) and torch.equal(one.test.images, other.test.images)


def test_nothing_is_read_unless_it_is_asked_for(root: Path) -> None:
    data = Cifar10Config().load(root)
    for split in (data.train, data.test):
        assert split.label_distribution is None
        assert split.clean_labels is None


def test_cifar10h_belongs_to_the_test_images(labelled) -> None:
    root, judged, _ = labelled
    data = Cifar10Config(label_sources=("cifar10h",)).load(root)
    assert data.test.label_distribution.dtype == torch.float32
    np.testing.assert_array_equal(data.test.label_distribution.numpy(), judged.astype(np.float32))
    assert data.train.label_distribution is None
    assert data.name == "cifar10"
    assert data.checksum == Cifar10Config().load(root).checksum


def test_cifar10n_is_the_mean_of_three_annotators(labelled) -> None:
    root, _, said = labelled
    data = Cifar10Config(label_sources=("cifar10n",)).load(root)
    wanted = sum(np.eye(NUM_CLASSES)[said[name]] for name in ANNOTATORS) / 3
    np.testing.assert_allclose(data.train.label_distribution.numpy(), wanted, atol=1e-7)
    assert data.test.label_distribution is None
    assert data.train.clean_labels is None
    assert data.train.labels.tolist() == said["clean_label"].tolist()


@pytest.mark.parametrize("name", ["clean", *ANNOTATORS])
def test_cifar10n_others_leaves_out_whose_labels_are_trained_on(labelled, name: str) -> None:
    root, _, said = labelled
    data = Cifar10Config(label_sources=("cifar10n_others", "cifar10h"), train_labels=name).load(root)
    others = [other for other in ANNOTATORS if other != name]
    wanted = sum(np.eye(NUM_CLASSES)[said[other]] for other in others) / len(others)
    np.testing.assert_allclose(data.train.label_distribution.numpy(), wanted, atol=1e-7)
    assert len(others) == (3 if name == "clean" else 2)
    assert data.train.labels.tolist() == said["clean_label" if name == "clean" else name].tolist()
    assert data.checksum == Cifar10Config(train_labels=name).load(root).checksum


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_labels": "aggre_label"}, "but aggre_label is made of all three, as aggre_label and worse_label are;"),
        ({"train_labels": "worse_label"}, "but worse_label is made of all three, as aggre_label and worse_label are;"),
        ({"label_sources": ("cifar10n_others", "cifar10n")}, "has both cifar10n and cifar10n_others; wanted one"),
    ],
)
def test_annotators_that_cannot_be_had_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse(Cifar10Config, {"label_sources": ["cifar10n_others"], **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*ANNOTATORS, "aggre_label", "worse_label"])
def test_networks_are_trained_on_whose_labels_are_asked_for(labelled, name: str) -> None:
    root, _, said = labelled
    data = Cifar10Config(train_labels=name).load(root)
    assert data.train.labels.tolist() == said[name].tolist()
    assert data.train.clean_labels.tolist() == said["clean_label"].tolist()
    assert data.train.label_distribution is None
    clean = Cifar10Config().load(root)
    assert torch.equal(data.test.labels, clean.test.labels)
    assert _same_images(data, clean)
    assert data.checksum != clean.checksum
    assert data.name == f"cifar10 ({name})"


def test_a_subset_has_the_same_images_whoever_labelled_them(labelled) -> None:
    root, judged, said = labelled
    settings = {"train_examples": 12, "test_examples": 8, "label_sources": BOTH}
    clean = Cifar10Config(**settings).load(root)
    rows = class_balanced_subset(torch.from_numpy(said["clean_label"]), 12, 0)
    test_rows = class_balanced_subset(Cifar10Config().load(root).test.labels, 8, 0)
    assert _same_images(clean, Cifar10Config(train_examples=12, test_examples=8).load(root))
    for name in (*ANNOTATORS, "worse_label"):
        noisy = Cifar10Config(train_labels=name, **settings).load(root)
        assert _same_images(noisy, clean)
        assert noisy.train.labels.tolist() == said[name][rows].tolist()
        assert noisy.train.clean_labels.bincount().tolist() == [3] * NUM_CLASSES
        assert torch.equal(noisy.train.label_distribution, clean.train.label_distribution)
        np.testing.assert_array_equal(noisy.test.label_distribution, judged.astype(np.float32)[test_rows])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_the_authors_files_are_read_as_well(labelled, dtype: type, old: bool) -> None:
    root, judged, said = labelled
    wanted = Cifar10Config(label_sources=BOTH, train_labels="worse_label").load(root)
    (root / "cifar10h.npz").unlink()
    (root / "cifar10n.npz").unlink()
    np.save(root / "cifar10h-probs.npy", judged)
    record = {name: labels.astype(dtype) for name, labels in said.items()}
    torch.save(record, root / "CIFAR-10_human.pt", _use_new_zipfile_serialization=not old)
    found = Cifar10Config(label_sources=BOTH, train_labels="worse_label").load(root)
    assert torch.equal(found.train.labels, wanted.train.labels)
    assert torch.equal(found.train.label_distribution, wanted.train.label_distribution)
    assert torch.equal(found.test.label_distribution, wanted.test.label_distribution)


def test_arrays_pickled_by_old_and_new_numpy_are_read(labelled) -> None:
    root, _, said = labelled
    path = root / "CIFAR-10_human.pt"
    torch.save(said, path, _use_new_zipfile_serialization=False)
    (root / "cifar10n.npz").unlink()
    content = path.read_bytes()
    own = b"numpy._core.multiarray" if b"numpy._core.multiarray" in content else b"numpy.core.multiarray"
    assert content.count(own) == 1
    for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        path.write_bytes(content.replace(own, module))
        data = Cifar10Config(train_labels="aggre_label").load(root)
        assert data.train.labels.tolist() == said["aggre_label"].tolist()


class _Program:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def _refused(root: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        Cifar10Config(**settings).load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_would_run_a_program_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    path = root / "CIFAR-10_human.pt"
    torch.save({"clean_label": _Program()}, path)
    message = _refused(root, label_sources=("cifar10n",))
    assert message.startswith(f"cannot read {path}: wanted a PyTorch file of a dictionary of integer arrays")
    np.save(root / "cifar10h-probs.npy", np.array([_Program()], object), allow_pickle=True)
    assert "allow_pickle=False" in _refused(root, label_sources=("cifar10h",))
    assert not (root / "hacked").exists()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1, 2], "it holds a list, wanted a dictionary of integer arrays"),
        ({}, "it has no random_label1, .*; it has nothing"),
        ({"clean_label": np.zeros(3, np.int64)}, "it has no random_label1, .*, worse_label; it has clean_label"),
        (dict.fromkeys(human_labels._LABELS, "x"), r"random_label1 of .* is <U1 of shape \[\]; wanted integers"),
        (dict.fromkeys(human_labels._LABELS, torch.zeros(3)), r"random_label1 of .* is float32 of shape \[3\]"),
    ],
)
def test_wrong_pytorch_files_are_refused(root: Path, record: Any, words: str) -> None:
    torch.save(record, root / "CIFAR-10_human.pt")
    with pytest.raises(InputError, match=words):
        Cifar10Config(train_labels="worse_label").load(root)


@pytest.mark.parametrize("name", ["CIFAR-10_human.pt", "cifar10n.npz", "cifar10h.npz", "cifar10h-probs.npy"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00v\x00{'de"])
def test_damaged_files_are_refused(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    source: Any = "cifar10h" if name.startswith("cifar10h") else "cifar10n"
    assert f"cannot read {root / name}: " in _refused(root, label_sources=(source,))


def test_a_single_array_and_several_are_told_apart(root: Path) -> None:
    with (root / "cifar10h-probs.npy").open("wb") as file:
        np.savez(file, probs=np.eye(4))
    message = _refused(root, label_sources=("cifar10h",))
    assert "the magic string is not correct" in message
    assert message.endswith("delete it to have it fetched again")
    with (root / "cifar10h.npz").open("wb") as file:
        np.save(file, np.eye(4))
    assert "it holds a single array, wanted an .npz file" in _refused(root, label_sources=("cifar10h",))


EYE = np.eye(NUM_CLASSES)[np.arange(NUM_TEST) % NUM_CLASSES]


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (EYE[:-1], "has 39 rows; wanted 40, one for each image"),
        (EYE[:, :3], r"is float64 of shape \[40, 3\]; wanted floating point of shape \[N, 4\]"),
        (EYE[0], r"is float64 of shape \[4\]; wanted floating point of shape \[N, 4\]"),
        (EYE.astype(int), r"is int64 of shape \[40, 4\]; wanted floating point"),
        (EYE.astype(str), r"of shape \[40, 4\]; wanted floating point"),
        (np.where(EYE > 0, np.nan, 0), "has values that are not finite"),
        (2 * EYE - 0.25, "has the value -0.25; wanted probabilities"),
        (
            EYE * (1 - 2e-4 * (np.arange(40) == 7)[:, None]),
            r"row 7 of probs of .*cifar10h.npz sums to 0.9998; wanted 1",
        ),
    ],
)
def test_distributions_that_are_none_are_refused(root: Path, probs: np.ndarray, words: str) -> None:
    np.savez(root / "cifar10h.npz", probs=probs)
    with pytest.raises(InputError, match=words) as caught:
        Cifar10Config(label_sources=("cifar10h",)).load(root)
    assert "\n" not in str(caught.value)


def test_judgements_in_another_order_are_refused(labelled) -> None:
    root, judged, _ = labelled
    order = np.argsort(judged.argmax(1), kind="stable")  # grouped by class, as other copies of the images are
    np.savez(root / "cifar10h.npz", probs=judged[order])
    own = (judged.argmax(1) == judged[order].argmax(1)).mean()
    assert _refused(root, label_sources=("cifar10h",)) == (
        f"argmax of {root / 'cifar10h.npz'} agrees with {100 * own:.1f} % of the test labels; wanted at least 95 %: "
        "its rows are not in the order of CIFAR-10's test images"
    )


@pytest.mark.parametrize(("wrong", "accepted"), [(2, True), (3, False)])
def test_some_judgements_may_differ_from_the_label(labelled, wrong: int, accepted: bool) -> None:
    root, judged, _ = labelled
    judged = judged.copy()
    judged[:wrong] = np.roll(judged[:wrong], 1, axis=1)  # 2 of 40 are 5 %
    np.savez(root / "cifar10h.npz", probs=judged)
    if accepted:
        Cifar10Config(label_sources=("cifar10h",)).load(root)
    else:
        assert "agrees with 92.5 % of the test labels" in _refused(root, label_sources=("cifar10h",))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "random_label2",
            lambda labels: labels[:-1],
            "random_label2 of .* has 39 labels; wanted 40, one for each image",
        ),
        ("worse_label", lambda labels: labels + 0.0, r"worse_label of .* is float64 of shape \[40\]; wanted integers"),
        ("aggre_label", lambda labels: labels[:, None], r"aggre_label of .* is int64 of shape \[40, 1\]"),
        ("random_label1", lambda labels: labels + 1, "random_label1 of .* has label 4; wanted 0 to 3"),
        ("random_label3", lambda labels: labels - 1, "random_label3 of .* has label -1; wanted 0 to 3"),
        ("clean_label", lambda labels: (labels + (np.arange(40) == 3)) % 4, "agrees with 39 of 40 training labels"),
        ("clean_label", lambda labels: labels[::-1], "its rows are not in the order of CIFAR-10's training images"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(labelled, name: str, change: Any, words: str) -> None:
    root, _, said = labelled
    np.savez(root / "cifar10n.npz", **{**said, name: change(said[name])})
    for settings in ({"label_sources": ("cifar10n",)}, {"train_labels": "random_label1"}):
        with pytest.raises(InputError, match=words) as caught:
            Cifar10Config(**settings).load(root)
        assert "\n" not in str(caught.value)


def test_a_file_without_an_array_is_refused(labelled) -> None:
    root, judged, said = labelled
    np.savez(root / "cifar10h.npz", counts=judged)
    assert "it has no array probs; it has counts" in _refused(root, label_sources=("cifar10h",))
    np.savez(root / "cifar10n.npz", **{name: labels for name, labels in said.items() if name != "aggre_label"})
    assert "it has no array aggre_label" in _refused(root, train_labels="worse_label")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):  # noqa: A002 - the parent's name
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a folder whose files stand for the authors' repositories."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("CIFAR10H_URL", "CIFAR10N_URL"):
        monkeypatch.setattr(human_labels, name, f"http://127.0.0.1:{server.server_port}/")
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_authors_files_are_downloaded_once(root: Path, served) -> None:
    folder, _ = served
    data = Cifar10Config().load(root)
    judged, said = _judgements(data.test.labels), _annotations(data.train.labels)
    np.save(folder / "cifar10h-probs.npy", judged)
    torch.save(said, folder / "CIFAR-10_human.pt")
    told: list[Any] = []
    config = Cifar10Config(label_sources=BOTH, train_labels="random_label3")
    first = config.load(root, progress=lambda *news: told.append(news[0]))
    assert set(told) == {"cifar10h-probs.npy", "CIFAR-10_human.pt"}
    for path in folder.iterdir():
        path.unlink()
    again = config.load(root)
    assert torch.equal(first.train.labels, again.train.labels)
    assert torch.equal(first.test.label_distribution, again.test.label_distribution)
    np.testing.assert_array_equal(first.test.label_distribution, judged.astype(np.float32))


@pytest.mark.parametrize(("source", "name"), [("cifar10h", "cifar10h-probs.npy"), ("cifar10n", "CIFAR-10_human.pt")])
def test_a_failed_download_names_file_address_and_folder(root: Path, served, source: Any, name: str) -> None:
    _, url = served
    message = _refused(root, label_sources=(source,))
    assert message.startswith(f"cannot download {url}/{name}: HTTP Error 404")
    assert f"put the file at {root / name} or set SOTEACHER_DATA to the folder that holds the data" in message
    assert not (root / name).exists()


@pytest.mark.parametrize(
    "settings", [{"label_sources": ("cifar10",)}, {"label_sources": "cifar10h"}, {"train_labels": "random_label4"}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Cifar10Config(**settings)


def _real(*names: str) -> Path:
    """Return a folder that has all the named files, of the usual ones."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    for folder in (Path(os.environ.get("SOTEACHER_DATA", "/nonexistent")), shared):
        if all((folder / name).is_file() for name in names):
            return folder
    pytest.skip(f"neither SOTEACHER_DATA nor ../shared/data has {' and '.join(names)}")


def test_the_real_annotators_have_their_known_noise() -> None:
    with np.load(_real("cifar10n.npz") / "cifar10n.npz") as said:
        clean = said["clean_label"]
        noise = {name: 100 * (said[name] != clean).mean() for name in (*ANNOTATORS, "aggre_label", "worse_label")}
        assert np.bincount(clean).tolist() == [5000] * 10
        learnt = np.full((len(clean), 10), 0.01 / 9)
        learnt[np.arange(len(clean)), said["random_label1"]] = 0.99
        shares = np.eye(10)[np.stack([said[name] for name in ANNOTATORS])]
    assert list(noise.values()) == pytest.approx([17.23, 18.12, 17.64, 9.01, 40.21], abs=0.006)
    # What the guide says of a network that has learnt the first annotator's labels by heart.
    distances = [np.square(learnt - shares[first:].mean(0)).sum(1).mean() for first in (0, 1)]
    assert distances == pytest.approx([0.183, 0.416], abs=0.0006)
    disagreeing = np.mean([1 - (shares[a] * shares[b]).sum(1).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert disagreeing / 3 == pytest.approx(0.095, abs=0.0006)


def test_the_real_judgements_sum_to_one() -> None:
    with np.load(_real("cifar10h.npz") / "cifar10h.npz") as said:
        np.testing.assert_allclose(said["probs"], said["counts"] / said["counts"].sum(1, keepdims=True), atol=1e-6)
        assert said["probs"].shape == (10_000, 10)


@pytest.mark.slow
def test_the_real_labels_fit_the_real_images(tmp_path: Path) -> None:
    labels = _real("cifar10h.npz", "cifar10n.npz")
    archive = Path(os.environ.get("SOTEACHER_DATA", "/nonexistent")) / "cifar-10-batches-py"
    if not archive.is_dir():
        pytest.skip("SOTEACHER_DATA does not name a folder with the CIFAR-10 archive")
    (tmp_path / archive.name).symlink_to(archive)
    for name in ("cifar10h.npz", "cifar10n.npz"):
        (tmp_path / name).symlink_to(labels / name)
    data = Cifar10Config(label_sources=BOTH, train_labels="random_label1").load(tmp_path)
    for split in (data.train, data.test):
        torch.testing.assert_close(split.label_distribution.double().sum(1), torch.ones(len(split.labels)).double())
    agreement = (data.test.label_distribution.argmax(1) == data.test.labels).double().mean().item()
    assert agreement == pytest.approx(0.9921, abs=1e-9)
    assert (data.train.labels != data.train.clean_labels).double().mean().item() == pytest.approx(0.1723, abs=6e-5)
    part = Cifar10Config(train_labels="random_label1", train_examples=5000).load(tmp_path)
    assert part.train.clean_labels.bincount().tolist() == [500] * 10
    assert torch.equal(part.train.images, Cifar10Config(train_examples=5000).load(tmp_path).train.images)
