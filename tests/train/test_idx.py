"""Idx files: read, refused when damaged, fetched when missing."""

import gzip
import hashlib
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from plainconv.files import InputError
from plainconv.train.idx import fetch, read_idx


def idx(array):
    """The bytes of an idx file of unsigned bytes."""
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())


ARRAY = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.fixture
def server(tmp_path):
    """A folder on the network: yields the folder and its address."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("array", [ARRAY, ARRAY[0, 0], ARRAY[:0]])
def test_what_was_written_is_read(tmp_path, array):
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(array), mtime=0))
    for name in ("plain", "packed.gz"):
        found = read_idx(tmp_path / name)
        assert found.dtype == torch.uint8
        assert torch.equal(found, array)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a", idx(ARRAY)[:-1], "states 2x3x4 numbers and holds 23"),
        ("a", idx(ARRAY) + b"\0", "holds 25"),
        ("a", idx(ARRAY)[:9], "not an idx file"),
        ("a", b"", "not an idx file"),
        ("a", b"\0\0\x0d\x01" + bytes(8), "not an idx file of unsigned bytes"),
        ("a.gz", gzip.compress(idx(ARRAY), mtime=0)[:-12], "damaged gzip"),
        ("a.gz", b"<html>no such page</html>", "damaged gzip"),
        ("a.gz", gzip.compress(idx(ARRAY), mtime=0)[:12] + b"\xff" * 40, "damaged gzip"),
    ],
)
def test_damage_is_said(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_idx(tmp_path / name)


def test_fetch(server, tmp_path):
    folder, address = server
    (folder / "a.gz").write_bytes(gzip.compress(idx(ARRAY), mtime=0))
    md5 = hashlib.md5((folder / "a.gz").read_bytes()).hexdigest()
    target = tmp_path / "deep" / "down" / "a.gz"
    fetch(f"{address}/a.gz", target, md5)
    assert torch.equal(read_idx(target), ARRAY)
    assert list(target.parent.iterdir()) == [target]


def test_a_wrong_checksum_keeps_nothing(server, tmp_path):
    folder, address = server
    (folder / "a.gz").write_bytes(b"something else")
    with pytest.raises(InputError, match="checksum"):
        fetch(f"{address}/a.gz", tmp_path / "new" / "a.gz", "0" * 32)
    assert list((tmp_path / "new").iterdir()) == []


def test_no_such_page_and_no_server(server, tmp_path):
    _, address = server
    for url in (f"{address}/none.gz", "http://127.0.0.1:9/none.gz"):
        with pytest.raises(InputError, match="cannot be downloaded"):
            fetch(url, tmp_path / "new" / "a.gz", "0" * 32)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\na beginning", b"nonsense\r\n"])
def test_an_answer_that_breaks_off_keeps_nothing(tmp_path, answer):
    class Short(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Short) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with pytest.raises(InputError):
            fetch(f"http://127.0.0.1:{running.server_port}/a.gz", tmp_path / "new" / "a.gz", "0" * 32)
        running.shutdown()
    assert list((tmp_path / "new").iterdir()) == []
