import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from soteacher.data.download import fetch, obtain_folder, unpack
from soteacher.errors import InputError


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):  # noqa: A002 - the parent's name
        pass


@pytest.fixture
def served(tmp_path):
    """Give a folder and the address at which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _archive(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def _refused(action, *args, **settings) -> str:
    with pytest.raises(InputError) as caught:
        action(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetch_writes_the_file_and_tells_progress(served, tmp_path):
    folder, url = served
    (folder / "a.bin").write_bytes(bytes(range(256)) * 3000)
    told = []
    fetch(
        url + "a.bin", tmp_path / "deep" / "a.bin", md5=_md5(folder / "a.bin"), progress=lambda *args: told.append(args)
    )
    assert (tmp_path / "deep" / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()
    assert told[-1] == ("a.bin", 768_000, 768_000)
    assert len(told) > 1


def test_fetch_with_another_checksum_leaves_nothing(served, tmp_path):
    folder, url = served
    (folder / "a.bin").write_bytes(b"changed")
    message = _refused(fetch, url + "a.bin", tmp_path / "got" / "a.bin", md5="0" * 32)
    assert f"the checksum is {_md5(folder / 'a.bin')}, wanted {'0' * 32}" in message
    assert list((tmp_path / "got").iterdir()) == []


def test_fetch_of_what_is_not_there_says_why(served, tmp_path):
    _, url = served
    message = _refused(fetch, url + "b.bin", tmp_path / "b.bin", md5="")
    assert "404" in message
    assert f"put the archive at {tmp_path / 'b.bin'} or set SOTEACHER_DATA" in message


def test_fetch_without_a_server_says_why(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Quiet) as server:
        port = server.server_port
    message = _refused(fetch, f"http://127.0.0.1:{port}/c", tmp_path / "c", md5="")
    assert message.startswith(f"cannot download http://127.0.0.1:{port}/c: ")
    assert "refused" in message


def test_unpack_gives_the_folder(tmp_path):
    unpack(_archive(tmp_path / "set.tar.gz", {"set/a": b"1", "set/b": b"2"}), tmp_path / "set")
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == {"a": b"1", "b": b"2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.tar.gz"]


@pytest.mark.parametrize(
    ("names", "words"),
    [({"set/a": b"1", "../outside": b"2"}, "outside"), ({"other/a": b"1"}, "holds no folder set")],
    ids=["climbing", "other"],
)
def test_unpack_refuses_what_does_not_belong(tmp_path, names, words):
    inner = tmp_path / "inner"
    inner.mkdir()
    assert words in _refused(unpack, _archive(inner / "set.tar.gz", names), inner / "set")
    assert [path.name for path in inner.iterdir()] == ["set.tar.gz"]
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def test_unpack_of_a_cut_archive_leaves_nothing(tmp_path):
    path = _archive(tmp_path / "set.tar.gz", {"set/a": bytes(range(256)) * 400})
    path.write_bytes(path.read_bytes()[:200])
    assert f"cannot unpack {path}" in _refused(unpack, path, tmp_path / "set")
    path.write_bytes(b"no archive")
    assert f"cannot unpack {path}" in _refused(unpack, path, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar.gz"]


def test_obtain_downloads_and_unpacks_once(served, tmp_path):
    folder, url = served
    path = _archive(folder / "set.tar.gz", {"set/a": b"1"})
    md5 = _md5(path)
    target = tmp_path / "root" / "set"
    obtain_folder(target, archive="set.tar.gz", md5=md5, url=url)
    assert (target / "a").read_bytes() == b"1"
    path.unlink()
    obtain_folder(target, archive="set.tar.gz", md5="never looked at", url=url)


def test_obtain_takes_an_archive_that_lies_there(tmp_path):
    path = _archive(tmp_path / "set.tar.gz", {"set/a": b"1"})
    obtain_folder(tmp_path / "set", archive="set.tar.gz", md5=_md5(path), url="http://127.0.0.1:1/")
    assert (tmp_path / "set" / "a").read_bytes() == b"1"


def test_obtain_refuses_a_damaged_archive_that_lies_there(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"half")
    settings = {"archive": "set.tar.gz", "md5": "1" * 32, "url": "http://127.0.0.1:1/"}
    message = _refused(obtain_folder, tmp_path / "set", **settings)
    assert f"{tmp_path / 'set.tar.gz'} is damaged: its checksum is {hashlib.md5(b'half').hexdigest()}" in message
