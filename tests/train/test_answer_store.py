import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.train.answer_store import CHECKS, PROVENANCE, VALUES, AnswerShape, AnswerStore

MADE_FROM = {"teacher": "a1b2", "data": {"checksum": 7, "size": [32, 32]}}
SHAPE = AnswerShape(num_examples=6, num_views=4, num_classes=5)
TOP_2 = AnswerShape(num_examples=6, num_views=4, num_classes=5, top_k=2)


def opened(folder: Path, shape: AnswerShape = SHAPE, **more: Any) -> AnswerStore:
    return AnswerStore.open(folder, shape, MADE_FROM | more)


def answers(num: int, shape: AnswerShape = SHAPE, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(num, shape.num_classes, generator=torch.Generator().manual_seed(0))


def all_keys(shape: AnswerShape = SHAPE) -> Tensor:
    return torch.arange(shape.num_entries)


def change_bytes(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def test_shape_counts_bytes() -> None:
    def sizes(num_classes: int, top_k: int | None) -> tuple[int, int]:
        shape = AnswerShape(num_examples=50_000, num_views=162, num_classes=num_classes, top_k=top_k)
        return shape.entry_bytes, shape.total_bytes

    assert sizes(100, None) == (200, 8_100_000 * 204)
    assert sizes(100, 8) == (8 * (2 + 2) + 2, 8_100_000 * 38)
    assert sizes(65_536, 1) == (2 + 2 + 2, 8_100_000 * 10)
    assert sizes(65_537, 1) == (2 + 4 + 2, 8_100_000 * 12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"num_views": -1}, "num_views must be at least 1, got -1"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 5}, "top_k must be below the 5 classes, got 5"),
        ({"num_examples": 2**62}, "do not fit into a file"),
    ],
)
def test_shape_refuses_what_cannot_be(changed: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnswerShape(**({"num_examples": 6, "num_views": 4, "num_classes": 5} | changed))


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    store = opened(tmp_path / "deep" / "store")
    logits, known = store.read(all_keys())
    assert not known.any()
    assert torch.equal(logits, torch.zeros(24, 5))
    assert logits.dtype == torch.float32
    assert store.known() == 0


def test_read_returns_what_was_written_rounded_as_torch_rounds(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = answers(7)
    logits[0] = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 65503.0])
    logits[1] = torch.tensor([6e-8, 2.9e-8, -6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11])  # subnormal, to zero, ties
    logits[2] = 0
    keys = torch.tensor([23, 0, 5, 9, 10, 11, 4])
    written = store.write(keys, logits)
    read, known = store.read(keys)
    wanted = logits.half().float()
    assert known.all()
    assert torch.equal(read.view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(written.view(torch.int32), wanted.view(torch.int32))
    mixed, known = store.read(torch.tensor([9, 1, 23, 9]))
    assert known.tolist() == [True, False, True, True]
    assert torch.equal(mixed, torch.stack([wanted[3], torch.zeros(5), wanted[0], wanted[3]]))
    assert store.known() == 7


@pytest.mark.parametrize("shape", [SHAPE, TOP_2])
def test_answers_outlive_the_store_and_are_seen_by_others(tmp_path: Path, shape: AnswerShape) -> None:
    first, second = opened(tmp_path, shape), opened(tmp_path, shape)
    written = first.write(all_keys(), answers(24, shape))
    first.close()
    assert torch.equal(second.read(all_keys())[0], written)
    assert opened(tmp_path, shape).read(all_keys())[1].all()


def test_write_leaves_its_arguments_and_gradients_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = answers(10).T[:5].T.contiguous().T.contiguous().T.requires_grad_()  # columns first in memory
    before = logits.detach().clone()
    written = store.write(torch.arange(20)[::2], logits)
    assert not written.requires_grad
    assert torch.equal(logits, before)
    assert torch.equal(store.read(torch.arange(0, 20, 2))[0], before.half().float())


def test_the_last_of_equal_keys_is_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = answers(3)
    written = store.write(torch.tensor([3, 8, 3]), logits)
    assert torch.equal(written, logits.half().float())
    assert torch.equal(store.read(torch.tensor([3, 8]))[0], written[[2, 1]])
    store.write(torch.tensor([3]), logits[1:2])
    assert torch.equal(store.read(torch.tensor([3]))[0], written[1:2])


def test_no_keys_are_no_answers(tmp_path: Path) -> None:
    store = opened(tmp_path)
    none = torch.empty(0, dtype=torch.int64)
    assert store.write(none, torch.empty(0, 5)).shape == (0, 5)
    logits, known = store.read(none)
    assert logits.shape == (0, 5)
    assert known.shape == (0,)


@pytest.mark.parametrize("shape", [SHAPE, TOP_2])
@pytest.mark.parametrize("value", [65504.01, -70000.0, math.inf, -math.inf, math.nan])
def test_what_float16_cannot_hold_is_returned_and_not_kept(tmp_path: Path, shape: AnswerShape, value: float) -> None:
    store = opened(tmp_path, shape)
    logits = answers(3, shape)
    logits[1, 4] = value
    written = store.write(torch.tensor([0, 1, 2]), logits)
    assert torch.equal(written[1].view(torch.int32), logits[1].view(torch.int32))
    read, known = store.read(torch.tensor([0, 1, 2]))
    assert known.tolist() == [True, False, True]
    assert torch.equal(read[[0, 2]], written[[0, 2]])


def test_top_k_by_hand(tmp_path: Path) -> None:
    logits = torch.tensor([[1.0, 4.0, 0.5, 3.0, 0.0]])
    store = opened(tmp_path, TOP_2)
    store.write(torch.tensor([13]), logits)
    read, _ = store.read(torch.tensor([13]))
    rest = math.exp(1.0) + math.exp(0.5) + math.exp(0.0)
    level = float(np.float16(math.log(rest / 3)))
    assert read.tolist() == [[level, 4.0, level, 3.0, level]]
    total = rest + math.exp(4.0) + math.exp(3.0)
    probabilities = read.double().softmax(dim=1)[0]
    assert probabilities[1].item() == pytest.approx(math.exp(4.0) / total, abs=2e-5)
    assert probabilities[3].item() == pytest.approx(math.exp(3.0) / total, abs=2e-5)
    assert probabilities[[0, 2, 4]].sum().item() == pytest.approx(rest / total, abs=2e-5)
    # The entry itself: the largest first, their classes, the level.
    entry = (tmp_path / VALUES).read_bytes()[13 * 10 : 14 * 10]
    assert entry == np.array([4.0, 3.0], np.float16).tobytes() + np.array([1, 3], np.uint16).tobytes() + (
        np.array([level], np.float16).tobytes()
    )


@pytest.mark.parametrize(("num_classes", "top_k"), [(2, 1), (50, 49), (50, 7), (65_536, 2), (65_537, 3)])
def test_top_k_keeps_the_top_probabilities_and_the_mass_of_the_rest(
    tmp_path: Path, num_classes: int, top_k: int
) -> None:
    shape = AnswerShape(num_examples=2, num_views=2, num_classes=num_classes, top_k=top_k)
    logits = answers(4, shape, scale=2.0)
    logits[0, -1] = 11.0  # the class with the largest number
    store = opened(tmp_path, shape)
    written = store.write(all_keys(shape), logits)
    read, known = store.read(all_keys(shape))
    assert known.all()
    assert torch.equal(read, written)
    for row, live in zip(read.double().numpy(), logits.double().numpy(), strict=True):
        top = np.argsort(-live)[:top_k]
        rest = np.setdiff1d(np.arange(num_classes), top)
        np.testing.assert_array_equal(row[top], live[top].astype(np.float16))
        assert len(set(row[rest])) == 1
        wanted, found = (np.exp(values) / np.exp(values).sum() for values in (live, row))
        np.testing.assert_allclose(found[top], wanted[top], atol=2e-3)
        assert found[rest].sum() == pytest.approx(wanted[rest].sum(), abs=2e-3)
        assert row[rest[0]] == pytest.approx(np.log(np.exp(live[rest]).mean()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("shape", [SHAPE, TOP_2])
def test_the_checksum_is_the_documented_one(tmp_path: Path, shape: AnswerShape) -> None:
    store = opened(tmp_path, shape)
    store.write(all_keys(shape), answers(24, shape))
    facts = json.loads((tmp_path / PROVENANCE).read_text())
    digest = hashlib.shake_128(json.dumps(facts, sort_keys=True).encode()).digest(8 * 7)
    first, of_key, *of_words = np.frombuffer(digest, np.uint64).tolist()
    values = np.fromfile(tmp_path / VALUES, np.uint16).reshape(24, 5).tolist()
    for key, (words, check) in enumerate(zip(values, np.fromfile(tmp_path / CHECKS, np.uint32), strict=True)):
        total = first + of_key * key + sum(weight * word for weight, word in zip(of_words, words, strict=True))
        assert check == max(1, total % 2**64 >> 32)


@pytest.mark.parametrize("shape", [SHAPE, TOP_2])
def test_any_changed_byte_makes_its_entry_unknown(tmp_path: Path, shape: AnswerShape) -> None:
    store = opened(tmp_path, shape)
    written = store.write(all_keys(shape), answers(24, shape))
    others = torch.arange(24) != 9
    for name, size in ((VALUES, shape.entry_bytes), (CHECKS, 4)):
        whole = (tmp_path / name).read_bytes()
        for position in range(9 * size, 10 * size):
            for flip in (0x01, 0x80, 0xFF):
                change_bytes(tmp_path / name, position, bytes([whole[position] ^ flip]))
                logits, known = store.read(all_keys(shape))
                assert torch.equal(known, others)
                assert not logits[9].any()
                assert torch.equal(logits[others], written[others])
            change_bytes(tmp_path / name, position, whole[position : position + 1])
    assert store.read(all_keys(shape))[1].all()


def test_entries_lost_in_part_or_whole_are_unknown_and_can_be_written_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = answers(24)
    written = store.write(all_keys(), logits)
    change_bytes(tmp_path / VALUES, 0, bytes(10))  # the values never reached the disk
    change_bytes(tmp_path / VALUES, 16, bytes(4))  # some of them
    change_bytes(tmp_path / CHECKS, 8, bytes(4))  # the checksum did not
    change_bytes(tmp_path / VALUES, 30, (tmp_path / VALUES).read_bytes()[40:50])  # an answer at another's place
    change_bytes(tmp_path / CHECKS, 12, (tmp_path / CHECKS).read_bytes()[16:20])
    _, known = store.read(all_keys())
    assert (~known).nonzero().flatten().tolist() == [0, 1, 2, 3]
    store.write(all_keys()[~known], logits[~known])
    assert torch.equal(store.read(all_keys())[0], written)


@pytest.mark.parametrize("shape", [SHAPE, TOP_2])
def test_a_reader_in_the_middle_of_a_write_gets_the_old_the_new_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: AnswerShape
) -> None:
    writer, reader = opened(tmp_path, shape), opened(tmp_path, shape)
    keys = torch.tensor([3, 4, 5])
    logits = answers(6, shape)
    old, pwrite, seen = writer.write(keys, logits[:3]), os.pwrite, []

    def in_pieces(descriptor: int, data: memoryview, position: int) -> int:
        seen.append(reader.read(keys))
        return pwrite(descriptor, data[:1], position)

    monkeypatch.setattr(os, "pwrite", in_pieces)
    new = writer.write(keys, logits[3:])
    assert len(seen) == 3 * (shape.entry_bytes + 4)
    for read, known in seen:
        right = (read == old).all(dim=1) | (read == new).all(dim=1)
        assert right[known].all()
        assert not read[~known].any()
    assert seen[0][1].tolist() == [True, True, True]
    assert seen[2][1].tolist() == [False, True, True]
    assert torch.equal(reader.read(keys)[0], new)


def test_the_default_type_of_numbers_does_not_matter(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = answers(3)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        written = store.write(torch.arange(3), logits)
        read, _ = store.read(torch.arange(3))
    finally:
        torch.set_default_dtype(default)
    assert written.dtype == read.dtype == torch.float32
    assert torch.equal(read, logits.half().float())


def test_files_of_another_store_are_unknown(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b", teacher="another")
    first.write(all_keys(), answers(24))
    for name in (VALUES, CHECKS):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert second.known() == 24
    assert not second.read(all_keys())[1].any()


def test_disk_space_is_taken_as_answers_come(tmp_path: Path) -> None:
    shape = AnswerShape(num_examples=2000, num_views=162, num_classes=100)
    store = opened(tmp_path, shape)
    logits = answers(50, shape)
    store.write(torch.arange(50) * 40, logits)
    assert sum((tmp_path / name).stat().st_size for name in (VALUES, CHECKS)) == shape.total_bytes == 324_000 * 204
    assert 50 * 204 <= store.bytes_used() < shape.total_bytes / 20
    assert store.known() == 50


BAD_KEYS = [
    (torch.tensor([0, 24]), r"must be in 0\.\.23, got 24"),
    (torch.tensor([-1, 2]), r"must be in 0\.\.23, got -1"),
    (torch.tensor([[1, 2]]), r"must be \[B\], int64 on the host, got \[1, 2\], int64 on cpu"),
    (torch.tensor([1, 2], dtype=torch.int32), r"got \[2\], int32 on cpu"),
    (torch.tensor([1.0, 2.0]), r"got \[2\], float32 on cpu"),
    (torch.empty(2, dtype=torch.int64, device="meta"), r"got \[2\], int64 on meta"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_KEYS)
def test_keys_are_checked(tmp_path: Path, keys: Tensor, message: str) -> None:
    store = opened(tmp_path)
    with pytest.raises(InputError, match=message):
        store.read(keys)
    with pytest.raises(InputError, match=message):
        store.write(keys, answers(2))
    assert store.known() == 0


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(2, 5).half(), torch.zeros(2, 5, device="meta"), torch.zeros(10)],
)
def test_answers_are_checked(tmp_path: Path, logits: Tensor) -> None:
    with pytest.raises(InputError, match=r"answers must be \[2, 5\], float32 on the host, got \["):
        opened(tmp_path).write(torch.tensor([0, 1]), logits)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    store.close()
    with pytest.raises(InputError, match="are closed"):
        store.read(all_keys())
    with pytest.raises(InputError, match="are closed"):
        store.write(all_keys(), answers(24))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "c3"}, "provenance.teacher is 'a1b2' there, and 'c3' was wanted"),
        ({"data": {"checksum": 7, "size": [32, 64]}}, r"provenance.data.size is \[32, 32\] there, and \[32, 64\] was"),
        ({"data": {"checksum": 7}}, r"provenance.data.size is \[32, 32\] there, and nothing was wanted"),
        ({"views": None}, "provenance.views is nothing there, and None was wanted"),
        ({"data": 7, "teacher": "c3"}, "provenance.teacher is 'a1b2'"),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    opened(tmp_path).write(all_keys(), answers(24))
    with pytest.raises(InputError, match=f"{tmp_path} holds answers of something else: {message}") as caught:
        opened(tmp_path, **changed)
    assert str(caught.value).endswith(f"; delete {tmp_path} or name another folder")
    assert opened(tmp_path, data={"size": (32, 32), "checksum": 7}).read(all_keys())[1].all()  # the same, as JSON


def test_another_shape_or_version_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(InputError, match=r"shape\.top_k is None there, and 2 was wanted"):
        opened(tmp_path, TOP_2)
    facts = json.loads((tmp_path / PROVENANCE).read_text())
    (tmp_path / PROVENANCE).write_text(json.dumps(facts | {"format_version": 2}))
    with pytest.raises(InputError, match="format_version is 2 there, and 1 was wanted"):
        opened(tmp_path)


@pytest.mark.parametrize("name", [VALUES, CHECKS])
def test_files_of_another_size_are_damaged(tmp_path: Path, name: str) -> None:
    opened(tmp_path)
    size = (tmp_path / name).stat().st_size
    for wrong in (0, size - 1, size + 4):
        os.truncate(tmp_path / name, wrong)
        with pytest.raises(InputError, match=f"{name} is damaged: it has {wrong} bytes and should have {size}; delete"):
            opened(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; delete {tmp_path} or name another folder"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [(b'{"form', "cannot be read"), (b"\xff", "cannot be read"), (b"[1]", "is damaged")]
)
def test_an_unreadable_provenance_is_damaged(tmp_path: Path, text: bytes, message: str) -> None:
    opened(tmp_path)
    (tmp_path / PROVENANCE).write_bytes(text)
    with pytest.raises(InputError, match=f"{PROVENANCE} {message}.*; delete {tmp_path} or name another folder"):
        opened(tmp_path)


def test_a_killed_creation_is_made_anew(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(all_keys(), answers(24))
    (tmp_path / PROVENANCE).unlink()
    (tmp_path / f".{VALUES}.123.part").write_bytes(b"half")
    again = opened(tmp_path)
    assert again.known() == 0
    assert store.read(all_keys())[1].all()  # who holds the old files keeps them
    assert {path.name for path in tmp_path.iterdir()} == {".lock", PROVENANCE, VALUES, CHECKS}
    (tmp_path / PROVENANCE).unlink()
    assert not opened(tmp_path, TOP_2).read(all_keys())[1].any()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be used: File exists"):
        opened(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be used: Not a directory"):
        opened(tmp_path / "file" / "store")


def test_a_full_disk_is_told_and_leaves_no_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    room = [25]
    pwrite = os.pwrite

    def nearly_full(descriptor: int, data: memoryview, position: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (size := min(len(data), room[0], 7))
        return pwrite(descriptor, data[:size], position)

    logits = answers(5)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", nearly_full)
        with pytest.raises(InputError, match=f"^the disk is full at {tmp_path / VALUES}; make room"):
            store.write(torch.arange(5), logits)
        assert not store.read(all_keys())[1].any()
        room[0] = 50 + 4 * 4 + 2  # all values, four checksums, half of one
        with pytest.raises(InputError, match=f"^the disk is full at {tmp_path / CHECKS}; make room"):
            store.write(torch.arange(5), logits)
    read, known = store.read(torch.arange(5))
    assert known.tolist() == [True, True, True, True, False]
    assert torch.equal(read[:4], logits[:4].half().float())
    store.write(torch.arange(5), logits)
    assert store.read(torch.arange(5))[1].all()


def test_a_disk_error_while_the_store_is_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=f"the disk is full at {tmp_path / VALUES}"):
            opened(tmp_path)
    assert not (tmp_path / PROVENANCE).exists()
    assert opened(tmp_path).known() == 0


def test_files_that_may_only_be_read_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = opened(tmp_path).write(all_keys(), answers(24))
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", read_only)
    store = opened(tmp_path)
    assert torch.equal(store.read(all_keys())[0], written)
    with pytest.raises(InputError, match=f"{tmp_path / VALUES} may not be written: it is open for reading only"):
        store.write(all_keys(), answers(24))


def test_windows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(InputError, match="cannot be stored on Windows"):
        opened(tmp_path)
    assert not list(tmp_path.iterdir())


# Entries of several pages, so that a reader can meet half of one; each writer has answers of its own for every key.
WIDE = AnswerShape(num_examples=10, num_views=6, num_classes=6000)
WRITER = """
import sys
from pathlib import Path
import torch
from soteacher.train.answer_store import AnswerShape, AnswerStore

writer, endless = int(sys.argv[2]), sys.argv[3] == "endless"
shape = AnswerShape(num_examples=10, num_views=6, num_classes=6000)
every = torch.arange(shape.num_entries)

def answers(keys):
    return ((keys[:, None] * 7 + torch.arange(6000) * 13 + writer * 17) % 1000).float()

print("ready", flush=True)
sys.stdin.readline()
store = AnswerStore.open(Path(sys.argv[1]), shape, {"teacher": "a1b2"})
print("open", flush=True)
order = torch.Generator().manual_seed(writer)
for _ in range(10**9 if endless else 50):
    keys = torch.randint(shape.num_entries, (16,), generator=order)
    logits = answers(keys)
    assert torch.equal(store.write(keys, logits), logits)
store.write(every, answers(every))
"""


def wide_answers(keys: Tensor, writer: int) -> Tensor:
    return ((keys[:, None] * 7 + torch.arange(6000) * 13 + writer * 17) % 1000).float()


def assert_each_is_somebody_s(keys: Tensor, logits: Tensor) -> None:
    assert torch.stack([(logits == wide_answers(keys, writer)).all(dim=1) for writer in range(3)]).any(dim=0).all()


def test_processes_that_make_write_and_read_at_once_see_only_right_answers(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(number), "endless" if number == 0 else "ends"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        store = AnswerStore.open(folder, WIDE, {"teacher": "a1b2"})
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
        seen = looks = 0
        end = time.monotonic() + 60
        while looks < 30 or seen == 0:
            logits, known = store.read(all_keys(WIDE))
            assert_each_is_somebody_s(all_keys(WIDE)[known], logits[known])
            mine = torch.arange(looks % 5, WIDE.num_entries, 5)
            store.write(mine, wide_answers(mine, 2))
            seen, looks = seen + int(known.sum()), looks + 1
            assert time.monotonic() < end
        writers[0].kill()
        assert [writer.wait(timeout=60) for writer in writers] == [-9, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    logits, known = store.read(all_keys(WIDE))
    assert_each_is_somebody_s(all_keys(WIDE)[known], logits[known])
    assert store.known() == WIDE.num_entries
    missing = all_keys(WIDE)[~known]
    store.write(missing, wide_answers(missing, 2))
    assert store.read(all_keys(WIDE))[1].all()
    assert {path.name for path in folder.iterdir()} == {".lock", PROVENANCE, VALUES, CHECKS}


def test_a_deleted_folder_ends_nobody_s_store(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    written = store.write(all_keys(), answers(24))
    assert opened(tmp_path / "store").known() == 0
    assert torch.equal(store.read(all_keys())[0], written)
