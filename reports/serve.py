"""A local page of all runs: their progress, their plans, their reports. Loopback only."""

from __future__ import annotations

import errno
import json
import mimetypes
import os
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ..jobs.folder import RunFolder
from ..jobs.job import read_log
from ..jobs.listing import JobInfo, list_jobs
from ..jobs.record import JobRecord
from .compare import compare
from .compared import render_comparison
from .html import render

HOST = "127.0.0.1"
PORT = 8321
LOG_LINES = 200  # that the page of a run shows
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class NotThere(Exception):
    """What was asked for is not served."""


def make_server(folder: Path, port: int = PORT) -> ThreadingHTTPServer:
    """A server of the runs in ``folder``, bound to this machine's loopback address.

    Only files whose names are in SHOWN are served, only from folders that hold a job, and only to
    requests that name this address as their host (so that no page of the web can read them).

    Args:
        folder: Where to look for runs.
        port: TCP port; 0 for any free one.

    Raises:
        ValueError: If the folder is missing, or another program listens on the port.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to look for runs in.")
    root = folder.resolve()

    class Handler(_Handler):
        runs = Runs(root, str(folder))

    try:
        server = _Server((HOST, port), Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else "is not allowed"
        raise ValueError(
            f"Port {port} of {HOST} {why}. Choose another one, such as --port {port + 1}, or "
            "--port 0 for any that is free."
        ) from error
    Handler.port = int(server.server_address[1])
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an open page does not keep the program from ending
    allow_reuse_address = os.name == "posix"  # elsewhere two servers would share a port


class Runs:
    """The runs below a folder, addressed by their path from there.

    Args:
        root: The folder, resolved.
        name: The folder as it was given.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name

    def overview(self) -> dict[str, Any]:
        """All runs, the latest active first, as JSON values."""
        return {"folder": self.name, "runs": [self._entry(j) for j in list_jobs(self.root)]}

    def details(self, name: str) -> dict[str, Any]:
        """One run with its stages and the end of its log."""
        folder = self.folder(name)
        entry = next((e for e in self.overview()["runs"] if e["name"] == name), None)
        if entry is None:
            raise NotThere(name)
        record = JobRecord.load(folder)
        more: dict[str, Any] = {
            "command": record.command.text,
            "stages": [stage.model_dump() for stage in record.stages],
            "log": read_log(folder)[-LOG_LINES:],
            "files": [file.name for file in RunFolder(folder).shown if file.is_file()],
            "study": RunFolder(folder).study.is_file(),
        }
        return {**entry, **more}

    def folder(self, name: str) -> Path:
        """The folder of a run; names that lead out of the root, or to no job, are refused.

        Raises:
            NotThere: If there is no such run.
        """
        folder = (self.root / name).resolve()
        if not folder.is_relative_to(self.root) or not RunFolder(folder).job.is_file():
            raise NotThere(name)
        return folder

    def file(self, name: str, file: str) -> Path:
        """A file of a run that may be shown.

        Raises:
            NotThere: If there is no such run or file, or it is not one that may be shown.
        """
        shown = {path.name: path for path in RunFolder(self.folder(name)).shown}
        path = shown[file].resolve() if file in shown else None
        if path is None or not path.is_relative_to(self.root) or not path.is_file():
            raise NotThere(file)
        return path

    def _entry(self, job: JobInfo) -> dict[str, Any]:
        folder, name = job.folder, job.folder.relative_to(self.root).as_posix()
        run = RunFolder(folder)
        return {
            "name": name,
            "title": folder.name if name == "." else name,
            "status": job.status,
            "started": job.started,
            "updated": job.updated,
            "seconds": job.seconds,
            "stage": job.stage,
            "doing": job.doing,
            "done": job.done,
            "total": job.total,
            "eta": job.eta,
            "budget": job.budget,
            "bpw": job.bpw,
            "kl": job.kl,
            "report": f"/files/{quote(name, safe='')}/{run.report.name}"
            if run.report.is_file()
            else None,
            "plan": run.plan.is_file(),
        }


class _Handler(BaseHTTPRequestHandler):
    runs: Runs
    port: int
    server_version = "bitplan"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until a connection that asks nothing is closed

    def do_GET(self) -> None:
        """Answer with a page, a file or JSON."""
        port = self.port
        suffix = "" if port == 80 else f":{port}"  # browsers leave out the port of http itself
        if self.headers.get("Host") not in (f"{HOST}{suffix}", f"localhost{suffix}"):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, f"This is {HOST}{suffix}.\n".encode())
            return
        parts = urlsplit(self.path)
        words = [unquote(word) for word in parts.path.split("/")[1:]]
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            self._route(words, query)
        except NotThere:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such page.\n")
        except (ValueError, OSError) as error:
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n".encode())

    do_HEAD = do_GET

    def _route(self, words: list[str], query: dict[str, str]) -> None:
        match words:
            case [""]:
                self._page(lambda: render("runs.html", data=None, scripts=("runs.js",)))
            case ["api", "runs"]:
                self._json(self.runs.overview())
            case ["api", "run"]:
                self._json(self.runs.details(query.get("name", "")))
            case ["compare"]:
                first, second = (self.runs.folder(query.get(side, "")) for side in ("a", "b"))
                self._page(lambda: render_comparison(compare(first, second)))
            case ["files", name, file]:
                path = self.runs.file(name, file)
                kind = "text/plain" if path.suffix in (".log", ".json") else None
                kind = kind or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
                self._send(HTTPStatus.OK, path.read_bytes(), kind)
            case _:
                raise NotThere("/".join(words))

    def _page(self, make: Callable[[], str]) -> None:
        self._send(HTTPStatus.OK, make().encode(), "text/html")

    def _json(self, data: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(data).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        text = kind.startswith("text/") or kind.endswith(("json", "svg+xml"))
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if text else kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the page asks every second."""
