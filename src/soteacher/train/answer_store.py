"""A teacher's answers in a folder: logits of examples in their augmented views, shared by processes and runs."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soteacher.errors import InputError
from soteacher.files import read_json, replacing, unwritable, write_json

FORMAT_VERSION = 1
PROVENANCE = "provenance.json"
VALUES = "answers.values"
CHECKS = "answers.checks"
LOCK = ".lock"
CHECK_BYTES = 4
LARGEST = 65504.0
"""The largest number of float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """How many answers a store has room for, and what it keeps of each.

    Raises:
        InputError: a number is below 1, ``top_k`` is not in 1..K-1, or the file would be larger than any can be.
    """

    num_examples: int
    num_views: int
    """Augmented views of an example; the key of an answer is ``example * num_views + view``."""
    num_classes: int
    """Classes, K."""
    top_k: int | None = None
    """Keep only so many of the largest logits and one level for the rest; ``None`` keeps all."""

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        if self.top_k is not None and self.top_k >= self.num_classes:
            raise InputError(f"top_k must be below the {self.num_classes} classes, got {self.top_k}")
        if self.total_bytes >= 2**63:
            raise InputError(f"answers of {self.total_bytes} bytes do not fit into a file")

    @property
    def num_entries(self) -> int:
        """Answers there is room for; keys are below it."""
        return self.num_examples * self.num_views

    @property
    def index_dtype(self) -> type[np.uint16 | np.int32]:
        """The type of a class's number beside the top k."""
        return np.uint16 if self.num_classes <= 2**16 else np.int32

    @property
    def entry_bytes(self) -> int:
        """Bytes of one answer in the file of values."""
        if self.top_k is None:
            return 2 * self.num_classes
        return self.top_k * (2 + np.dtype(self.index_dtype).itemsize) + 2

    @property
    def total_bytes(self) -> int:
        """Bytes of a full store: its values and their checksums."""
        return self.num_entries * (self.entry_bytes + CHECK_BYTES)


@final
class AnswerStore:
    r"""Logits by key, in float16, made by :meth:`open`.

    Without ``top_k`` an entry is the K logits :math:`z`, each rounded to the nearest float16. With it, an entry is the
    k largest, their classes and one level for all others,

    .. math:: r = \log \frac{1}{K - k} \sum_{j \notin \text{top } k} e^{z_j},

    which stands in their place when the entry is read: at temperature 1 the top k keep their probabilities and the
    rest their sum (to the rounding); at other temperatures the rest is flatter than it was.

    A folder holds the values, a checksum for each entry and, written last, what the answers were made from. An entry is
    known where its checksum fits the bytes read, so one that another process is writing, that a kill cut short or that
    a power cut lost in part is an unknown one and never a wrong one (but for a chance of :math:`2^{-32}`). The checksum
    also covers the key and what the answers were made from. Any number of processes may read and write at once.
    Nothing is locked for it: of two answers for the same key one stays, or the entry is unknown and is written again.

    The values take disk space only as they are written; the space of the checksums is taken when the folder is made.
    """

    def __init__(self, folder: Path, shape: AnswerShape, facts: Mapping[str, Any]) -> None:
        """Open the files of a folder; ``facts`` are those of its ``provenance.json``, already compared."""
        self.shape = shape
        self._folder = folder
        self._values = _Rows(folder / VALUES, shape.num_entries, shape.entry_bytes // 2, np.uint16)
        self._checks = _Rows(folder / CHECKS, shape.num_entries, 1, np.uint32)
        # One weight for each word, one for the key, one to begin with: random numbers that are this store's own.
        text = json.dumps(facts, sort_keys=True).encode()
        digest = hashlib.shake_128(text).digest(8 * (shape.entry_bytes // 2 + 2))
        self._weights = np.frombuffer(digest, dtype=np.uint64)

    @classmethod
    def open(cls, folder: Path, shape: AnswerShape, provenance: Mapping[str, Any]) -> AnswerStore:
        """Open the store in a folder, or make it there; several processes may do so at the same moment.

        Args:
            folder: where it lies; what a killed process left of a store there is replaced.
            shape: what it has room for.
            provenance: everything that decides an answer (teacher, images, views), as plain JSON values.

        Raises:
            InputError: the folder holds answers of something else or damaged ones, or cannot be made or read.
        """
        if sys.platform == "win32":
            raise InputError("answers of a teacher cannot be stored on Windows: its files cannot be shared this way")
        facts = {"format_version": FORMAT_VERSION, "shape": asdict(shape), "provenance": dict(provenance)}
        wanted = json.loads(json.dumps(facts, allow_nan=False))
        with _told(folder):
            if not (folder / PROVENANCE).exists():
                _make(folder, shape, wanted)
            there = _facts(folder)
            differing = _difference(there, wanted)
            if differing is not None:
                raise InputError(f"{folder} holds answers of something else: {differing}; {_remedy(folder)}")
            return cls(folder, shape, there)

    def read(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is known.

        Args:
            keys: ``[B]``, int64, on the host.

        Returns:
            Logits ``[B, K]``, float32, zeros where not known; and ``[B]``, bool, which are known. Both on the host.

        Raises:
            InputError: the keys are of another type or shape, or outside the store.
        """
        places = self._places(keys)
        logits = torch.zeros(len(places), self.shape.num_classes, dtype=torch.float32, device="cpu")
        known = torch.zeros(len(places), dtype=torch.bool, device="cpu")
        checks = self._checks.mapped[places, 0]
        # Values are looked at only where some were written: to touch a hole of a mapped file costs memory.
        rows = np.flatnonzero(checks)
        # A copy, so that the bytes that are checked are those that are returned, whoever writes meanwhile.
        entries = self._values.mapped[places[rows]]
        fits = self._checksums(places[rows], entries) == checks[rows]
        rows = torch.from_numpy(rows[fits])
        logits[rows] = self._decoded(entries[fits])
        known[rows] = True
        return logits, known

    def write(self, keys: Tensor, logits: Tensor) -> Tensor:
        """Keep answers, and return them as :meth:`read` will give them, so that a caller uses the same values always.

        An answer with a logit that is not finite or beyond 65504 has no float16: it is not kept, and is returned as it
        came. Of several answers for one key, the last is kept.

        Args:
            keys: ``[B]``, int64, on the host.
            logits: ``[B, K]``, float32, on the host.

        Returns:
            ``[B, K]``, float32, on the host, without gradients.

        Raises:
            InputError: keys or logits are of another type or shape, or keys outside the store; the disk is full, or
                the files cannot be written.
        """
        places = self._places(keys)
        wanted = (len(places), self.shape.num_classes)
        if logits.shape != wanted or logits.dtype != torch.float32 or logits.device.type != "cpu":
            raise InputError(f"answers must be {list(wanted)}, float32 on the host, got {_described(logits)}")
        rounded = logits.detach().clone()
        keep = rounded.abs().amax(dim=1) <= LARGEST  # false for NaN
        entries = self._encoded(rounded[keep])
        rounded[keep] = self._decoded(entries)
        places = places[keep.numpy()]
        # The checksums follow their values, so that a kill between the two leaves unknown entries.
        self._values.write(places, entries)
        self._checks.write(places, self._checksums(places, entries))
        return rounded

    def known(self) -> int:
        """Return how many entries were written; those that do not fit their checksum are among them."""
        return int(np.count_nonzero(self._checks.mapped))

    def bytes_used(self) -> int:
        """Return the disk space that the files take up."""
        return self._values.bytes_used() + self._checks.bytes_used()

    def close(self) -> None:
        """Let go of the files; the store is of no use after it."""
        self._values.close()
        self._checks.close()

    def _places(self, keys: Tensor) -> NDArray[np.int64]:
        """Return the keys as an array, after a look at them."""
        if self._values.closed:
            raise InputError(f"the answers at {self._folder} are closed")
        if keys.ndim != 1 or keys.dtype != torch.int64 or keys.device.type != "cpu":
            raise InputError(f"keys of answers must be [B], int64 on the host, got {_described(keys)}")
        places = keys.numpy()
        outside = places[(places < 0) | (places >= self.shape.num_entries)]
        if outside.size:
            raise InputError(f"keys of answers must be in 0..{self.shape.num_entries - 1}, got {outside[0]}")
        return places

    def _checksums(self, places: NDArray[np.int64], entries: NDArray[np.uint16]) -> NDArray[np.uint32]:
        r"""Return a checksum for each entry, at least 1: 0 stands for an entry that was never written.

        .. math:: \max(1, \lfloor (a_0 + a_1 \, \text{key} + \sum_i a_{i+2} \, m_i \bmod 2^{64}) / 2^{32} \rfloor)

        for words :math:`m` of 16 bits and random weights :math:`a` of 64.

        Source: the family MULTILINEAR of Lemire and Kaser 2014, arXiv:1202.4961; the key is ours.
        """
        sums = entries.astype(np.uint64) @ self._weights[2:]
        sums += places.astype(np.uint64) * self._weights[1] + self._weights[0]
        return np.maximum(sums >> np.uint64(32), np.uint64(1)).astype(np.uint32)

    def _encoded(self, logits: Tensor) -> NDArray[np.uint16]:
        """Return the entries of logits ``[B, K]``: top k, classes and level, in words of 16 bits."""
        top_k = self.shape.top_k
        if top_k is None:
            return logits.half().numpy().view(np.uint16)
        values, classes = logits.topk(top_k, dim=1)
        rest = logits.scatter(1, classes, -math.inf).logsumexp(dim=1, keepdim=True)
        level = rest - math.log(self.shape.num_classes - top_k)
        parts = (values.half().numpy(), classes.numpy().astype(self.shape.index_dtype), level.half().numpy())
        return np.concatenate([part.view(np.uint16) for part in parts], axis=1)

    def _decoded(self, entries: NDArray[np.uint16]) -> Tensor:
        """Return the logits ``[B, K]`` of entries."""
        top_k = self.shape.top_k
        halves = torch.from_numpy(entries.view(np.float16))
        if top_k is None:
            return halves.float()
        classes = torch.from_numpy(entries[:, top_k:-1].view(self.shape.index_dtype).astype(np.int64))
        logits = halves[:, -1:].float().repeat(1, self.shape.num_classes)
        return logits.scatter_(1, classes, halves[:, :top_k].float())


@final
class _Rows:
    """Rows of equal length in a file, read through a map and written through the file."""

    def __init__(self, path: Path, num_rows: int, width: int, dtype: type[np.uint16 | np.uint32]) -> None:
        self._path = path
        self._descriptor, self._writable = _opened(path)
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        there = os.fstat(self._descriptor).st_size
        size = num_rows * width * np.dtype(dtype).itemsize
        if there != size:
            remedy = _remedy(path.parent)
            raise InputError(f"{path} is damaged: it has {there} bytes and should have {size}; {remedy}")
        view = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self.mapped: NDArray[Any] = np.frombuffer(view, dtype=dtype).reshape(num_rows, width)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be read or written."""
        return not self._closing.alive

    def write(self, places: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write rows to their places. Not through the map: there a full disk would end the process by a signal."""
        if not self._writable:
            raise InputError(f"{self._path} may not be written: it is open for reading only")
        size = self.mapped.strides[0]
        data = memoryview(rows.tobytes())
        with _told(self._path):
            for number, place in enumerate(places.tolist()):
                row, position = data[number * size : (number + 1) * size], place * size
                while row:  # a disk that is nearly full takes a part first
                    written = os.pwrite(self._descriptor, row, position)
                    row, position = row[written:], position + written

    def bytes_used(self) -> int:
        """Return the disk space of the file."""
        return os.fstat(self._descriptor).st_blocks * 512

    def close(self) -> None:
        """Close the file and drop the map."""
        self._closing()
        self._descriptor = -1  # its number may soon be another file's
        self.mapped = self.mapped[:0].copy()


def _make(folder: Path, shape: AnswerShape, facts: Mapping[str, Any]) -> None:
    """Make an empty store, unless another process has done so meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / PROVENANCE).exists():
            return
        for path in folder.glob(".*.part"):  # of a process that was killed at it
            path.unlink(missing_ok=True)
        with replacing(folder / VALUES) as part, part.open("wb") as file:
            file.truncate(shape.num_entries * shape.entry_bytes)
        with replacing(folder / CHECKS) as part, part.open("wb") as file:
            size = shape.num_entries * CHECK_BYTES
            file.truncate(size)
            # Checksums are read through a map, and a full file system in memory ends a process that reads a hole there.
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
        write_json(folder / PROVENANCE, facts)


@contextmanager
def _locked(folder: Path) -> Generator[None, None, None]:
    """Wait until no other process makes a store in the folder, and keep the others waiting; a kill ends it."""
    import fcntl  # not on Windows, where this module can still be imported

    with (folder / LOCK).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    try:
        facts = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {_remedy(folder)}") from None
    if not isinstance(facts, dict):
        raise InputError(f"{path} is damaged: it does not hold a table; {_remedy(folder)}")
    return facts


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return the first field that differs, with both values; ``None`` where all agree."""
    for name in [*wanted, *(name for name in there if name not in wanted)]:
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _difference(old, new, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif old != new or (name in there) != (name in wanted):
            shown = [repr(tree[name]) if name in tree else "nothing" for tree in (there, wanted)]
            return f"{prefix}{name} is {shown[0]} there, and {shown[1]} was wanted"
    return None


def _opened(path: Path) -> tuple[int, bool]:
    """Return an open file's descriptor, and whether it may be written or, where no more is allowed, only be read."""
    try:
        try:
            return os.open(path, os.O_RDWR), True
        except OSError:
            return os.open(path, os.O_RDONLY), False
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {_remedy(path.parent)}") from None


@contextmanager
def _told(path: Path) -> Generator[None, None, None]:
    """Turn an error of the file system into one line about the file, or about ``path`` where it names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise InputError(unwritable(error) or f"{error.filename} cannot be used: {error.strerror}") from None


def _remedy(folder: Path) -> str:
    return f"delete {folder} or name another folder"


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
