"""A small server for one reader on this machine: it binds to loopback, and answers no other name.

Nothing is served but runs that were found in the folders that are named; no address becomes a path.
"""

import errno
import gzip
import json
import re
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from photon import __version__
from photon.errors import PhotonError
from photon.report.library import library
from photon.report.page import Figure, Tree
from photon.report.run import Run
from photon.report.script import SCRIPT
from photon.report.write import html_of, report_page
from photon.ui import render
from photon.ui.found import Glances, find_runs
from photon.ui.live import LiveComparison, LiveRun
from photon.ui.script import FOLLOW

HOST = "127.0.0.1"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HTML, _JSON, _SCRIPT = "text/html", "application/json", "text/javascript"
#: Runs that one page lays side by side.
_MOST_COMPARED = 24
#: Pages on several runs that are kept.
_MOST_COMPARISONS = 4

Answer = tuple[str, bytes]
_Maker = Callable[[dict[str, list[str]]], Answer]


class NotFoundError(Exception):
    """What was asked for is not here."""


class Site:
    """What is served.

    Parameters
    ----------
    where
        Folders of runs, and folders that hold some.
    """

    def __init__(self, where: list[Path]) -> None:
        self._where = where
        self._runs: dict[str, LiveRun] = {}
        self._comparisons: dict[tuple[str, ...], LiveComparison] = {}
        self._glances = Glances()
        self.pages: dict[str, _Maker] = {
            "/": self._list,
            "/news": self._list_news,
            "/run": self._run,
            "/run/news": self._run_news,
            "/figures": self._figures,
            "/compare": self._compare,
            "/compare/news": self._compare_news,
            "/report.html": self._report,
            "/library.js": lambda asked: (_SCRIPT, library().encode()),
            "/page.js": lambda asked: (_SCRIPT, (SCRIPT + FOLLOW).encode()),
        }

    def _found(self) -> dict[str, Path]:
        return find_runs(self._where)

    def _live(self, asked: dict[str, list[str]]) -> LiveRun:
        name = asked.get("id", [""])[0]
        if name not in self._runs:
            folder = self._found().get(name)
            if folder is None:
                raise NotFoundError
            self._runs[name] = LiveRun(name, folder)
        return self._runs[name]

    def _rows(self) -> list[dict[str, Any]]:
        return [self._glances.row(name, folder) for name, folder in self._found().items()]

    def _list(self, asked: dict[str, list[str]]) -> Answer:
        body = render.list_body(self._rows(), [str(folder) for folder in self._where])
        return _html(render.framed("Runs", body, {"news": "/news?", "charts": {}, "html": {}}))

    def _list_news(self, asked: dict[str, list[str]]) -> Answer:
        return _json({"version": "", "html": {"rows": render.list_rows(self._rows())}, "charts": None})

    def _run(self, asked: dict[str, list[str]]) -> Answer:
        run = self._live(asked)
        state = run.state()
        inside = {place: html for place, html in state.html.items() if place.startswith("in-")}
        data = {
            "news": "/run/news?",
            "id": run.name,
            "version": state.version,
            "charts": state.charts,
            "html": inside,
            "more": run.has_more,
        }
        return _html(render.framed(run.name, render.run_body(state.html), data))

    def _run_news(self, asked: dict[str, list[str]]) -> Answer:
        return _json(self._live(asked).since(asked.get("version", [""])[0]))

    def _figures(self, asked: dict[str, list[str]]) -> Answer:
        panel = self._live(asked).panel(asked.get("panel", [""])[0])
        if not isinstance(panel, Figure | Tree):
            raise NotFoundError
        return _html(render.figures(panel))

    def _named(self, asked: dict[str, list[str]]) -> dict[str, Path]:
        found = self._found()
        names = list(dict.fromkeys(asked.get("id", [])))[:_MOST_COMPARED]
        if not names or not set(names) <= found.keys():
            raise NotFoundError
        return {name: found[name] for name in names}

    def _comparison(self, named: dict[str, Path]) -> LiveComparison:
        names = tuple(named)
        if names not in self._comparisons:
            while len(self._comparisons) >= _MOST_COMPARISONS:
                del self._comparisons[next(iter(self._comparisons))]
            self._comparisons[names] = LiveComparison(list(named.values()))
        return self._comparisons[names]

    def _compare(self, asked: dict[str, list[str]]) -> Answer:
        named = self._named(asked)
        title, state = self._comparison(named).state()
        news = f"/compare/news?{urlencode([('id', name) for name in named])}&"
        body = render.placed("comparison", state.html["comparison"])
        data = {"news": news, "version": state.version, "charts": state.charts, "html": {}}
        return _html(render.framed(title, body, data))

    def _compare_news(self, asked: dict[str, list[str]]) -> Answer:
        found = self._comparison(self._named(asked))
        return _json(found.since(asked.get("version", [""])[0]))

    def _report(self, asked: dict[str, list[str]]) -> Answer:
        runs = [Run.load(folder) for folder in self._named(asked).values()]
        return _html(html_of(report_page(runs)))


def _html(text: str) -> Answer:
    # Half of a character, which a model may write, is none in a page.
    return _HTML, text.encode("utf-8", "replace")


def _json(value: Any) -> Answer:
    return _JSON, json.dumps(value, allow_nan=False).encode()


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = f"photon/{__version__}"
        sys_version = ""
        # One that connects and says nothing must not hold a thread for ever.
        timeout = 30

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            page = site.pages.get(address.path)
            # By another name, a page of somebody else would ask for what is here.
            if not is_loopback_name(self.headers.get("Host", "")):
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"photon ui answers to localhost alone\n")
            elif page is None:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")
            else:
                self._answer(page, parse_qs(address.query))

        def _answer(self, page: _Maker, asked: dict[str, list[str]]) -> None:
            try:
                kind, content = page(asked)
            except NotFoundError:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such run\n")
            except PhotonError as error:
                text = f"{error}\n".encode("utf-8", "replace")
                self._send(HTTPStatus.CONFLICT, "text/plain", text)
            else:
                self._send(HTTPStatus.OK, kind, content)

        def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            packed = len(content) > 2000 and "gzip" in self.headers.get("Accept-Encoding", "")
            body = _packed(content) if packed else content
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            if packed:
                self.send_header("Content-Encoding", "gzip")
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing of requests: the terminal is the user's."""

    return Handler


@lru_cache(4)
def _packed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=5, mtime=0)


def is_loopback_name(host: str) -> bool:
    """Return whether a request's ``Host`` names this machine's loopback, at whatever port."""
    return re.fullmatch(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", host, re.IGNORECASE) is not None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a reader who has closed the page; anything else is told as usual."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def listen(where: list[Path], port: int) -> ThreadingHTTPServer:
    """Return a server that listens on loopback; 0 takes a free port.

    Raises
    ------
    PhotonError
        A folder is not there, or the port cannot be had.
    """
    for folder in where:
        if not folder.is_dir():
            raise PhotonError(f"{folder}: no such folder; name the folder of a run, or one that holds some")
    library()
    try:
        return _Server((HOST, port), _handler(Site(where)))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise PhotonError(f"--port {port}: cannot be used ({error.strerror}); name another") from None
        raise PhotonError(f"--port {port}: already in use; name another, or 0 for a free one") from None
