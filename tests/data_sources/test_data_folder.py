import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soteacher.data.augment import AugmentConfig
from soteacher.data.dataset import DataSet
from soteacher.data.folder import FolderConfig
from soteacher.data.folder_images import FolderImages, read_image
from soteacher.data.loader import EvaluationLoader, TrainLoader
from soteacher.errors import InputError

DEFAULT = AugmentConfig()


def _noise(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photographs(tmp_path):
    """Give a folder of two classes, six training and two test images each, of several formats and sizes."""
    root = tmp_path / "pets"
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                suffix = ("png", "jpg", "bmp")[number % 3]
                _noise(100 * label + number, 20 + number, 30 - 2 * number).save(folder / f"{number}.{suffix}")
    return root


def _load(folder: Path, **settings) -> DataSet:
    return FolderConfig(path=folder, **{"image_size": 8, **settings}).load(folder)


def _refused(folder: Path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        _load(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_become_classes(photographs):
    data = _load(photographs)
    assert (data.name, data.class_names, data.in_channels, data.image_size) == ("pets", ("cat", "dog"), 3, 8)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert data.train.images.shape == (12, 3, 8, 8)
    assert torch.equal(data.train.images[6], read_image(photographs / "train" / "dog" / "0.png", 8))
    assert data.skipped == ()
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist())


def test_folders_within_a_class_belong_to_it_and_other_files_do_not(photographs):
    cat = photographs / "train" / "cat"
    (cat / "more").mkdir()
    _noise(1).save(cat / "more" / "x.PNG")
    (cat / "boxes.txt").write_text("no image")
    (cat / ".hidden.png").write_text("no image")
    (photographs / "train" / ".cache").mkdir()
    assert torch.bincount(_load(photographs).train.labels).tolist() == [7, 6]


def test_val_serves_as_test_split(photographs):
    wanted = _load(photographs)
    (photographs / "test").rename(photographs / "val")
    assert _load(photographs).checksum == wanted.checksum
    (photographs / "test").mkdir()
    assert "has both folders test and val; set test_folder to one of them" in _refused(photographs)
    assert _load(photographs, test_folder="val").checksum == wanted.checksum


def _batches(data: DataSet, *, workers: int = 0, start: int = 0, augment: AugmentConfig = DEFAULT):
    loader = TrainLoader(data.train, batch_size=5, augment=augment, seed=0, device="cpu", workers=workers)
    return list(loader.epoch(1, start=start))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_in_memory_give_the_same_batches(photographs, workers):
    memory, streamed = _load(photographs, in_memory=True), _load(photographs, in_memory=False)
    assert isinstance(streamed.train.images, FolderImages)
    assert (memory.mean, memory.std) == (streamed.mean, streamed.std)
    before = torch.get_rng_state()
    for start in (0, 2):
        pairs = zip(_batches(memory, start=start), _batches(streamed, workers=workers, start=start), strict=True)
        for one, other in pairs:
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.indices, other.indices)
    assert torch.equal(before, torch.get_rng_state())
    (one,) = EvaluationLoader(memory.test, batch_size=9, device="cpu")
    (other,) = EvaluationLoader(streamed.test, batch_size=9, device="cpu", workers=workers)
    assert torch.equal(one.images, other.images)


def test_streamed_subset_has_the_same_rows(photographs):
    memory = _load(photographs, train_examples=6)
    streamed = _load(photographs, train_examples=6, in_memory=False)
    assert isinstance(streamed.train.images, FolderImages)
    assert torch.equal(memory.train.images, streamed.train.images.decode())
    assert torch.equal(memory.train.labels, streamed.train.labels)


def test_the_checksum_of_files_sees_names_and_sizes_but_not_the_place(photographs):
    before = _load(photographs, in_memory=False).checksum
    moved = photographs.rename(photographs.with_name("moved"))
    assert _load(moved, in_memory=False).checksum == before
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "00.png")
    assert _load(moved, in_memory=False).checksum != before


def test_large_sets_are_streamed_of_their_own_accord(photographs, monkeypatch):
    monkeypatch.setattr("soteacher.data.folder.MEMORY_LIMIT_BYTES", 16 * 3 * 64 - 1)
    assert isinstance(_load(photographs).train.images, FolderImages)
    monkeypatch.setattr("soteacher.data.folder.MEMORY_LIMIT_BYTES", 16 * 3 * 64)
    assert isinstance(_load(photographs).train.images, torch.Tensor)


def test_progress_is_told_in_bytes(photographs):
    told = []
    FolderConfig(path=photographs).load(photographs, progress=lambda *args: told.append(args))
    train_bytes = sum(path.stat().st_size for path in (photographs / "train").rglob("*.*"))
    assert told[11][1:] == (train_bytes, train_bytes)
    assert len(told) == 16


def test_an_unreadable_image_is_an_error_that_names_it(photographs):
    broken = photographs / "train" / "dog" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    message = _refused(photographs)
    assert message.startswith(f"cannot read image {broken}: ")
    assert message.endswith("; skip_unreadable: true leaves such images out")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_a_stream_is_an_error_in_one_line(photographs, workers):
    data = _load(photographs, in_memory=False)
    broken = photographs / "train" / "dog" / "1.jpg"
    broken.write_text("no image")
    with pytest.raises(InputError) as caught:
        _batches(data, workers=workers)
    assert str(caught.value).startswith(f"cannot read image {broken}: ")
    assert "skip_unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)


def _workers_of_this_process() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_decoding_outlasts_signals_to_all_processes_and_ends_with_the_iteration(photographs):
    data = _load(photographs, in_memory=False)
    wanted = _batches(data)
    loader = TrainLoader(data.train, batch_size=5, augment=DEFAULT, seed=0, device="cpu", workers=2)
    batches = loader.epoch(1)
    found = [next(batches), next(batches)]  # one of each process: both are past their start
    processes = _workers_of_this_process()
    assert len(processes) == 2
    for process in processes:
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    found += batches
    assert all(torch.equal(one.images, other.images) for one, other in zip(found, wanted, strict=True))
    assert _workers_of_this_process() == []
    broken_off = loader.epoch(1)
    next(broken_off)
    assert len(_workers_of_this_process()) == 2
    broken_off.close()
    assert _workers_of_this_process() == []


SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
import torch
import torch.utils.data._utils.worker as worker
from soteacher.data.folder import FolderConfig
from soteacher.data.loader import EvaluationLoader

worker.MP_STATUS_CHECK_INTERVAL = 0.2  # how often a process looks after its parent; 5 seconds otherwise
data = FolderConfig(path=Path(sys.argv[1]), image_size=8, in_memory=False).load(Path(sys.argv[1]))
batches = iter(EvaluationLoader(data.train, batch_size=2, device="cpu", workers=2))
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "killed":
    time.sleep(60)
"""


def _running(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("end", ["killed", "at its end"])
def test_decoding_ends_when_the_program_ends_amid_an_iteration(photographs, end):
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(photographs), end], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        processes = [int(word) for word in program.stdout.readline().split()]
        assert len(processes) == 2
        if end == "killed":
            program.kill()
        try:
            program.wait(20)
        finally:
            program.kill()
        assert program.returncode == (-signal.SIGKILL if end == "killed" else 0)
        patience = time.monotonic() + 20
        while any(map(_running, processes)) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not any(map(_running, processes))


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_can_be_skipped(photographs, in_memory):
    broken = [photographs / "test" / "cat" / "0.png", photographs / "train" / "dog" / "1.jpg"]
    for path in broken:
        path.write_text("no image")
    data = _load(photographs, skip_unreadable=True, in_memory=in_memory)
    assert sorted(data.skipped) == broken
    assert torch.bincount(data.train.labels).tolist() == [6, 5]
    assert torch.bincount(data.test.labels).tolist() == [1, 2]
    assert sum(len(batch.labels) for batch in _batches(data)) == 11


def test_a_class_of_which_nothing_is_left_is_refused(photographs):
    for path in (photographs / "test" / "dog").iterdir():
        path.write_text("no image")
    message = _refused(photographs, skip_unreadable=True)
    assert message == f"class folder {photographs / 'test' / 'dog'} has no image that can be read"


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_missing_folders_are_refused(photographs):
    assert _refused(photographs / "none") == f"image folder {photographs / 'none'} does not exist"
    assert _refused(photographs, test_folder="val") == f"folder {photographs / 'val'} does not exist"
    _remove(photographs / "test")
    assert _refused(photographs) == f"{photographs} has no folder test or val; wanted train and one of them"
    (photographs / "train").rename(photographs / "test")
    assert _refused(photographs) == f"folder {photographs / 'train'} does not exist"


def test_classes_must_be_the_same_in_both_splits(photographs):
    (photographs / "test" / "dog").rename(photographs / "test" / "wolf")
    assert _refused(photographs) == f"{photographs / 'test'} lacks classes that the other split has: dog"


def test_an_empty_class_and_a_single_class_are_refused(photographs):
    for path in (photographs / "train" / "dog").iterdir():
        path.unlink()
    assert _refused(photographs) == f"class folder {photographs / 'train' / 'dog'} holds no image"
    (photographs / "train" / "dog").rmdir()
    assert "has only the class folder cat; wanted a folder for each of 2 or more classes" in _refused(photographs)


def test_the_shorter_side_is_scaled_and_the_middle_kept(tmp_path):
    wide = _noise(0, 30, 10)
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "tall.png")
    wanted = np.array(wide.resize((15, 5), Image.Resampling.BILINEAR).crop((5, 0, 10, 5)))
    assert torch.equal(read_image(tmp_path / "wide.png", 5), torch.from_numpy(wanted).permute(2, 0, 1))
    assert torch.equal(read_image(tmp_path / "tall.png", 5), torch.from_numpy(wanted).permute(2, 1, 0))


def test_a_large_jpeg_keeps_its_middle(tmp_path):
    pixels = np.full((400, 800, 3), 50, np.uint8)
    pixels[:, 200:600] = 200
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    image = read_image(tmp_path / "x.jpg", 32).float()
    assert image.mean() == pytest.approx(200, abs=3)
    assert image[:, :, 2:-2].sub(200).abs().max() < 3


def test_an_image_of_the_wanted_size_is_unchanged(tmp_path):
    _noise(0, 8, 8).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 8), torch.from_numpy(np.array(_noise(0, 8, 8))).permute(2, 0, 1))


def test_the_cameras_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    _noise(0, 8, 8).save(tmp_path / "x.png", exif=exif)
    wanted = torch.from_numpy(np.array(_noise(0, 8, 8).transpose(Image.Transpose.ROTATE_270))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "x.png", 8), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    result = read_image(tmp_path / f"x.{suffix}", 8)
    assert result.shape == (3, 8, 8)
    assert result.unique().tolist() == [40_000 >> 8 if mode == "I;16" else 255]


def test_a_palette_with_transparency_is_read(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 100, 50] + [0] * 765)
    image.save(tmp_path / "x.png", transparency=bytes([128] + [255] * 255))
    assert read_image(tmp_path / "x.png", 8)[:, 0, 0].tolist() == [200, 100, 50]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x.tif: its pixels are floating-point numbers"):
        read_image(tmp_path / "x.tif", 8)
