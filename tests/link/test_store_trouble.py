"""A store that fails for a moment is asked again; one that stays away ends in one line."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from photon.errors import PhotonError, RunError
from photon.link import store as store_module
from photon.link.records import HEADER
from photon.link.store import download
from photon.link.transport import TICKET
from tests.link.stored import (
    RUN,
    Sides,
    assert_equal,
    changed,
    groups,
)


class Flaky(BaseHTTPRequestHandler):
    """Pass requests on to the S3 server, but fail the first ones of each kind."""

    upstream: tuple[str, int]
    failures: dict[str, int]
    seen: list[str]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).seen.append(self.command)
        left = self.failures.get(self.command, 0)
        type(self).failures[self.command] = max(0, left - 1)
        if left % 2:
            self.send_error(503)
            return
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        # An even number of failures left: the connection breaks in the middle of the answer.
        self.wfile.write(data[: len(data) // 2] if left else data)
        self.close_connection = True

    do_GET = do_PUT = _pass_on

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def flaky(bucket: Any) -> Iterator[tuple[str, type[Flaky]]]:
    host, _, port = bucket.meta.endpoint_url.removeprefix("http://").partition(":")
    handler = type("Here", (Flaky,), {"upstream": (host, int(port)), "failures": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def through(url: str, request: RecordDict, endpoint: str) -> RecordDict:
    """Return ``request`` with its presigned requests led through ``url``."""
    moved = RecordDict(dict(request))
    for record, key in ((HEADER, "object"), (TICKET, "ticket")):
        text = str(request[record][key]).replace(endpoint, url)
        moved[record] = ConfigRecord({**request[record], key: text})
    return moved


def test_requests_are_tried_again_after_trouble_that_passes(
    tmp_path: Path, bucket: Any, flaky: tuple[str, type[Flaky]]
) -> None:
    url, handler = flaky
    sides = Sides(tmp_path, "s3://photon/runs", presigned=True)
    request, ticket = sides.request(groups())
    request = through(url, request, bucket.meta.endpoint_url)
    handler.failures = {"GET": 3, "PUT": 3}
    assert_equal(sides.silo.receive(request), groups())
    assert_equal(sides.server.receive(sides.reply(groups(1), request), ticket), groups(1))
    # A part whose answer is empty arrives even when the connection then breaks.
    assert handler.seen[:4] == ["GET"] * 4
    assert handler.seen[4:] in (["PUT"] * 2, ["PUT"] * 4)


def test_trouble_that_stays_ends_in_one_line(
    tmp_path: Path, bucket: Any, flaky: tuple[str, type[Flaky]]
) -> None:
    url, handler = flaky
    sides = Sides(tmp_path, "s3://photon/runs", presigned=True)
    request, _ = sides.request(groups())
    request = through(url, request, bucket.meta.endpoint_url)
    handler.failures = {"GET": 99}
    with pytest.raises(PhotonError, match=r"link: cannot read the object at 127.0.0.1"):
        sides.silo.receive(request)
    assert len(handler.seen) == store_module.TRIES


def test_an_upload_whose_end_was_told_twice_counts_once(tmp_path: Path, bucket: Any) -> None:
    """The answer to the first request may be lost, and the client's library sends it again."""
    sides = Sides(tmp_path, "s3://photon/runs", presigned=True)
    request, ticket = sides.request(groups())
    reply = sides.reply(groups(1), request)
    assert_equal(sides.server.receive(reply, ticket), groups(1))
    assert_equal(sides.server.receive(reply, ticket), groups(1))
    request, ticket = sides.request(groups())
    sides.server._signing.remove(RUN)  # type: ignore[union-attr]
    with pytest.raises(PhotonError, match="cannot finish the upload"):
        sides.server.receive(changed(reply, lambda r: r.update(key=ticket.key)), ticket)  # type: ignore[union-attr]


def test_a_download_is_refused_when_the_disk_cannot_hold_it(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="make room"):
        download(lambda _a, _b: b"", 2**60, tmp_path, "the object")


def test_a_server_that_cannot_write_stops_resumably(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sides = Sides(tmp_path, str(tmp_path / "file" / "store"))
    with pytest.raises(RunError, match="link: cannot write"):
        sides.request(groups())
