"""Downloads against servers that cut, know no ranges, or have another file."""

import email.utils
import hashlib
import resource
import threading
import time
from contextlib import contextmanager, suppress
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


def test_without_a_checksum_only_connections_of_one_call_are_joined(path, part):
    part.write_bytes(b"another file")
    with Server(limits=[50_000]) as server:
        download([server.address], path, None, wait=0.001, quiet=True)
    assert is_complete(path) and server.requests == [None, "bytes=50000-"]


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


# Servers with ways of their own.


class Answers(Server):
    """Calls ``answer(handler, number of the request, first byte asked for)``."""

    def __init__(self, answer):
        super().__init__()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.requests.append(asked)
                with suppress(OSError):  # the other side has gone
                    answer(self, len(server.requests), int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0)

            def log_message(self, *arguments):
                pass

        self.http.RequestHandlerClass = Handler


def send(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler):
    send(handler, 200, CONTENT, Content_Length=len(CONTENT))


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that are waited, without waiting."""
    waited = []
    monkeypatch.setattr("preprocess.download.time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(path, status):
    with Answers(lambda h, n, at: whole(h) if n > 2 else send(h, status)) as server:
        fetch(path, server)
    assert is_complete(path) and len(server.requests) == 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("100000", 120), ("-5", 0.001), ("nan", 0.001), ("soon", 0.001), (30, pytest.approx(30, abs=5))],
)
def test_a_server_says_how_long_to_wait(path, header, seconds, pauses):
    said = email.utils.formatdate(time.time() + header, usegmt=True) if isinstance(header, int) else header
    with Answers(lambda h, n, at: whole(h) if n > 1 else send(h, 429, Retry_After=said)) as server:
        fetch(path, server)
    assert is_complete(path) and pauses == [seconds]


def test_a_cut_file_whose_length_was_not_announced(path):
    with Answers(lambda h, n, at: send(h, 206 if at else 200, CONTENT[at : at + 60_000])) as server:
        fetch(path, server, size=len(CONTENT))
    assert is_complete(path)
    assert server.requests == [None, "bytes=60000-"]


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_file_without_end_is_stopped(path, kept, size):
    def endless(handler, number, at):
        send(handler, 206 if at else 200)
        while True:
            handler.wfile.write(CONTENT)

    path.parent.mkdir()
    if kept:
        path.with_name("corpus.zip.part").write_bytes(CONTENT[:kept])
    with Answers(endless) as server, pytest.raises(DownloadError, match=r"more than 102,400 bytes, and is another"):
        download([server.address], path, SHA256, size, wait=0.001, at_most=len(CONTENT))
    assert len(server.requests) == 1
    assert [file.read_bytes() for file in path.parent.iterdir()] == [CONTENT[:kept]] * bool(kept)


@pytest.mark.parametrize("length", ["many", "-3", str(len(CONTENT) + 50)])
def test_a_length_that_is_none(path, length):
    def answer(handler, number, at):
        send(handler, 416) if at else send(handler, 200, CONTENT, Content_Length=length)

    with Answers(answer) as server:
        fetch(path, server)
    assert is_complete(path)


@pytest.mark.parametrize("sent_from", [0, 100])
def test_a_server_that_sends_another_range(path, part, sent_from):
    part.write_bytes(CONTENT[:5000])

    def answer(handler, number, at):
        start = sent_from if number == 1 or sent_from == 0 else at
        send(handler, 206, CONTENT[start:], Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")

    with Answers(answer) as server:
        fetch(path, server, size=len(CONTENT))
    assert is_complete(path)


def test_a_file_that_changes_between_two_connections(path):
    def answer(handler, number, at):
        body = CONTENT if number > 1 else bytes(len(CONTENT))
        send(handler, 206 if at else 200, body[at:][: 50_000 if number == 1 else None], Content_Length=len(body) - at)

    with Answers(answer) as server:
        fetch(path, server, size=len(CONTENT))
    assert is_complete(path)
    assert server.requests == [None, "bytes=50000-", None]


def test_a_redirect_leads_neither_to_a_file_nor_to_another_name(path, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    to_a_file = Answers(lambda h, n, at: send(h, 302, Location=secret.as_uri()))
    with to_a_file as server, pytest.raises(DownloadError, match="HTTP Error 302"):
        fetch(path, server)
    assert list(path.parent.iterdir()) == []

    def answer(handler, number, at):
        send(handler, 302, Location="/../../evil.zip", Content_Length=0) if number == 1 else whole(handler)

    with Answers(answer) as server:
        fetch(path, server)
    assert is_complete(path)


@contextmanager
def room(size):
    """Files may be no longer, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_no_trouble_of_the_server(path, pauses):
    with Server() as server:
        with room(50_000), pytest.raises(OSError, match="File too large"):
            fetch(path, server, server)
        assert len(server.requests) == 1 and pauses == []
        fetch(path, server)
    assert is_complete(path)
