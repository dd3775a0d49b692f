"""Downloads against servers that cut, know no ranges, or have another file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preprocess.download import ATTEMPTS, DownloadError, download

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves one content. Each connection sends *limits* bytes in turn at most, then all."""

    def __init__(self, content=CONTENT, ranges=True, limits=(), status=200):
        self.requests = []  # the range asked for, or None
        limits = list(limits)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.requests.append(asked)
                assert "Python" not in self.headers["User-Agent"]
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges else 0
                if status != 200 or (start and start >= len(content)):
                    self.send_error(status if status != 200 else 416)
                    return
                self.send_response(206 if asked and ranges else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: limits.pop(0) if limits else None])

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/corpus.zip"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def fetch(path, *servers, size=None):
    download([server.address for server in servers], path, SHA256, size, wait=0.001)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "corpus.zip"


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name("corpus.zip.part")


def is_complete(path):
    return path.read_bytes() == CONTENT and [file.name for file in path.parent.iterdir()] == ["corpus.zip"]


def test_a_file_in_one_go(path):
    with Server() as server:
        fetch(path, server, size=len(CONTENT))
    assert is_complete(path)
    assert server.requests == [None]


def test_cut_connections_go_on_where_they_were(path):
    with Server(limits=[30_000, 20_001, 1]) as server:
        fetch(path, server)
    assert is_complete(path)
    assert server.requests == [None, "bytes=30000-", "bytes=50001-", "bytes=50002-"]


def test_a_server_without_ranges_starts_again(path):
    with Server(ranges=False, limits=[30_000]) as server:
        fetch(path, server)
    assert is_complete(path)
    assert server.requests == [None, "bytes=30000-"]


def test_what_a_killed_process_left_is_gone_on_with(path, part):
    part.write_bytes(CONTENT[:70_000])
    with Server() as server:
        fetch(path, server, size=len(CONTENT))
    assert is_complete(path)
    assert server.requests == ["bytes=70000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_is_whole_already(path, part, ranges):
    part.write_bytes(CONTENT)
    with Server(ranges=ranges) as server:
        fetch(path, server)
    assert is_complete(path)


@pytest.mark.parametrize("left", [70_000, 200_000])
def test_a_part_of_another_file_is_not_kept(path, part, left):
    part.write_bytes(b"x" * left)
    with Server() as server:
        fetch(path, server)
    assert is_complete(path)
    assert server.requests == [f"bytes={left}-", None]


def test_another_file_is_refused_and_not_kept(path):
    other = CONTENT[:-1] + b"x"
    with Server(other, limits=[50_000]) as server, pytest.raises(DownloadError) as error:
        fetch(path, server)
    assert SHA256 in str(error.value)
    assert hashlib.sha256(other).hexdigest() in str(error.value)
    assert list(path.parent.iterdir()) == []


def test_a_file_of_another_size_is_not_even_fetched(path):
    with Server(b"<html>moved</html>") as server, pytest.raises(DownloadError, match="18 bytes, not 102,400"):
        fetch(path, server, size=len(CONTENT))
    assert list(path.parent.iterdir()) == []


def test_the_next_address_is_tried(path):
    with Server(status=404) as gone, Server(b"other") as wrong, Server() as server:
        fetch(path, gone, wrong, server)
    assert is_complete(path)
    assert len(gone.requests) == 1  # asking again would not help


def test_no_address_has_it(path):
    with Server(status=404) as gone, Server(status=503) as busy, pytest.raises(DownloadError) as error:
        fetch(path, gone, busy)
    message = str(error.value)
    assert f"{gone.address}: HTTP Error 404" in message
    assert f"{busy.address}: HTTP Error 503" in message
    assert "--source" in message
    assert len(busy.requests) == ATTEMPTS


def test_a_connection_that_brings_nothing_any_more(path):
    with Server(limits=[1000] + [0] * 20) as server, pytest.raises(DownloadError, match="1,000 bytes are kept"):
        fetch(path, server)
    with Server() as server:
        fetch(path, server)
    assert is_complete(path)
    assert server.requests == ["bytes=1000-"]
