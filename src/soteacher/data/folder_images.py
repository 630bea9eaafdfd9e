"""Image files as square RGB images of one size, decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from soteacher.data.download import Progress
from soteacher.data.reason import reason
from soteacher.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """Files below a folder, each read as one image."""

    folder: Path
    files: tuple[str, ...]
    """Names relative to ``folder``, with forward slashes."""
    num_bytes: tuple[int, ...]
    """Size of each file."""
    image_size: int
    """Height and width that every image is brought to, in pixels; see :func:`read_image`."""

    def __len__(self) -> int:
        return len(self.files)

    def select(self, rows: Iterable[int]) -> FolderImages:
        """Return the given files, in their order."""
        rows = tuple(rows)
        return FolderImages(
            folder=self.folder,
            files=tuple(self.files[row] for row in rows),
            num_bytes=tuple(self.num_bytes[row] for row in rows),
            image_size=self.image_size,
        )

    def read(self, row: int) -> Tensor:
        """Return one image, ``[3, image_size, image_size]`` uint8; see :func:`read_image`."""
        return read_image(self.folder / self.files[row], self.image_size)

    def decode(self, progress: Progress | None = None) -> Tensor:
        """Return all images, ``[N, 3, image_size, image_size]`` uint8.

        Raises:
            InputError: a file cannot be read as an image.
        """
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def fill(row: int) -> None:
            images[row] = self.read(row)

        self._for_each(fill, progress)
        return images

    def unreadable(self, progress: Progress | None = None) -> tuple[int, ...]:
        """Return the rows whose files cannot be read as images; reads all of them."""
        failed: list[int] = []

        def attempt(row: int) -> None:
            try:
                self.read(row)
            except InputError:
                failed.append(row)

        self._for_each(attempt, progress)
        return tuple(sorted(failed))

    def _for_each(self, action: Callable[[int], None], progress: Progress | None) -> None:
        """Apply an action to every row, on threads: Pillow decodes and resizes outside the interpreter's lock."""
        total, done = sum(self.num_bytes), 0
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            for row, _ in enumerate(threads.map(action, range(len(self)))):
                done += self.num_bytes[row]
                if progress is not None:
                    progress(f"reading {self.folder}", done, total)


def read_image(path: Path, image_size: int) -> Tensor:
    """Read an image file as a square RGB image.

    The camera's orientation (EXIF) is applied, the image is resized (bilinear, antialiased) so that its shorter side
    is ``image_size`` pixels, and the square in the middle is cut out: what lies outside it is lost. Transparency is
    dropped; of an animation the first frame is taken; of 16 bits of grey the upper 8.

    Returns:
        ``[3, image_size, image_size]`` uint8.

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            # JPEG decoders can shrink while they decode: to a size that is still at least the wanted one.
            file.draft("RGB", (image_size, image_size))
            square = _square(_as_rgb(ImageOps.exif_transpose(file)), image_size)
    except Exception as error:  # a broken file can raise nearly anything from Pillow's many decoders
        raise InputError(
            f"cannot read image {path}: {reason(error)}; skip_unreadable: true leaves such images out"
        ) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InputError("its pixels are floating-point numbers; wanted integers")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side and cut out the middle in one step, so that the longer side need not be rounded."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
