"""Official archives: fetched once, checked and unpacked."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from soteacher.data.reason import reason
from soteacher.errors import InputError
from soteacher.files import replacing

Progress = Callable[[str, int, int | None], None]
"""Told ``(what is being done, bytes done, bytes in all or None)``, again and again."""

TIMEOUT_SECONDS = 30.0
"""How long a server may stay silent."""
_CHUNK_BYTES = 1 << 18


def fetch(url: str, path: Path, *, md5: str | None, progress: Progress | None = None) -> None:
    """Download a file, check it and put it in its place; on failure nothing is left there.

    Args:
        url: where it is.
        path: where to put it.
        md5: the checksum that it must have; None where it is not known, and the reader checks the contents.
        progress: told the file's name, bytes done and bytes in all.

    Raises:
        InputError: it cannot be downloaded or written, or has another checksum.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with replacing(path) as part:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, part.open("wb") as file:
                length = response.headers.get("Content-Length")
                total = int(length) if length and length.isdigit() else None
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    if progress is not None:
                        progress(path.name, file.tell(), total)
            if md5 is not None and digest.hexdigest() != md5:
                raise InputError(f"the checksum is {digest.hexdigest()}, wanted {md5}")
    except (OSError, HTTPException, InputError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the server's response as well
        raise InputError(
            f"cannot download {url}: {reason(error)}; put the {'file' if md5 is None else 'archive'} at {path} "
            "or set SOTEACHER_DATA to the folder that holds the data"
        ) from error


def check(path: Path, *, md5: str) -> None:
    """Check the MD5 checksum of a file.

    Raises:
        InputError: it has another one.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise InputError(
            f"{path} is damaged: its checksum is {digest.hexdigest()}, wanted {md5}; delete it to have it fetched again"
        )


def unpack(archive: Path, destination: Path) -> None:
    """Unpack one folder of a tar archive; it appears whole or not at all.

    Args:
        archive: a tar file, compressed or not, that holds a folder of the destination's name.
        destination: where that folder is to be.

    Raises:
        InputError: the archive is damaged, would write outside its own folder, or does not hold the folder.
    """
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as beside:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(beside, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot unpack {archive}: {reason(error)}") from error
        folder = Path(beside) / destination.name
        if not folder.is_dir():
            raise InputError(f"archive {archive} holds no folder {destination.name}")
        try:
            folder.rename(destination)
        except OSError:
            # Another process may have unpacked the same archive in the meantime: what it wrote is as good.
            if not destination.is_dir():
                raise


def obtain_folder(folder: Path, *, archive: str, md5: str, url: str, progress: Progress | None = None) -> None:
    """See to it that an archive's folder is on disk: as it is, else from the archive beside it, else downloaded.

    Args:
        folder: where it is to be.
        archive: the archive's file name.
        md5: the archive's checksum.
        url: where archives are, without the file name.
        progress: told of a download.

    Raises:
        InputError: the archive cannot be downloaded or is damaged.
    """
    if folder.is_dir():
        return
    path = folder.parent / archive
    if path.is_file():
        check(path, md5=md5)
    else:
        fetch(f"{url.rstrip('/')}/{archive}", path, md5=md5, progress=progress)
    unpack(path, folder)


def obtain_file(paths: Sequence[Path], *, url: str, progress: Progress | None = None) -> Path:
    """Return where a file is that may have several names: the first that is on disk, else the last, downloaded.

    Its checksum is not known: who reads it checks what it holds.

    Args:
        paths: where it may be; the last is where a download goes.
        url: where files are, without the file name.
        progress: told of a download.

    Raises:
        InputError: the file cannot be downloaded.
    """
    for path in paths:
        if path.is_file():
            return path
    fetch(f"{url.rstrip('/')}/{paths[-1].name}", paths[-1], md5=None, progress=progress)
    return paths[-1]
