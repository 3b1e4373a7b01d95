"""A Hugging Face Hub on 127.0.0.1: real HTTP to the real client, kept in memory, with faults on request.

What `huggingface_hub` 2.4 and `diffusers` call for when they create, fill, read and load a repo is served: models,
datasets and Spaces, revisions by branch, tag and commit, private and gated repos, cards that are checked, both upload
paths. Without Xet (`HF_HUB_DISABLE_XET=1`) large files come by Git LFS in one PUT. With it, the client's default,
`hf_xet` keeps chunks in a folder when the token points it to `local://FOLDER`; such a folder is open to one process at
a time, so each token gets its own: the server reads what a client wrote when the commit names it, and fills a fresh
folder for a client that wants to read. What is not served answers 501: pull requests, LFS in several parts, moving a
repo, copying large files between repos, running a Space. Listings come in one page and files without the redirect to
a content network. The rules for cards are the documented ones, not the Hub's own code.

    with Hub() as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.env("hf_user"), check=True)
        assert hub.repos["user/name"].files()["README.md"].startswith(b"---")

By hand: `python tests/support/loopback_hub.py --port 8000` prints what to export in another terminal.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from tests.support.hub_content import Refused, Repo, User, Xet
from tests.support.hub_routes import Answer, Request, Routes

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Fault:
    """What goes wrong with some requests: see `Hub.fail`. `hits` counts them; `clear()` ends it."""

    where: str
    times: int | None
    status: int | None
    message: str
    headers: dict[str, str]
    delay: float
    drop: str | None
    reset: bool
    hits: int = 0

    def clear(self) -> None:
        self.times = self.hits

    def meets(self, request: Request) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if self.where in Routes.names():
            return self.where == request.route
        return bool(re.search(self.where, f"{request.method} {request.path}"))


class Dropped(Exception):
    """The connection is to be cut now."""


class Hub:
    """The server, its content and its faults. Use it in a `with` statement, or call `start`, `stop` and `close`.

    Attributes:
        repos: "user/name", "datasets/user/name" or "spaces/user/name" -> `Repo`.
        users: token -> `User`; at first "hf_user" of "user", "hf_reader" (a read token of the same user) and
            "hf_other" of "other".
        requests: every `Request` so far.
        errors: tracebacks of defects of the server itself, which answers 500 then.
    """

    def __init__(self, port: int = 0, verbose: bool = False) -> None:
        self.port, self.verbose = port, verbose
        self.repos: dict[str, Repo] = {}
        self.users = {"hf_user": User("user"), "hf_reader": User("user", "read"), "hf_other": User("other")}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[str] = []
        self.lock = threading.RLock()
        self.secret = uuid.uuid4().hex  # signs the addresses of large files
        self.root = Path(tempfile.mkdtemp(prefix="loopback_hub_"))
        self.xet = Xet(self.root)
        self.server: Server | None = None

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> "Hub":
        """Listen; after a `stop`, on the same port and with all that was there."""
        assert self.server is None, "already started"
        self.server = Server(self)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """As a machine that went away: connections are refused, open ones cut."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            for connection in list(self.server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.server = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, token: str | None = "hf_user", home: Path | None = None, **more: str) -> dict[str, str]:
        """The environment of a process that takes this for the Hub, as on a machine of its own.

        Args:
            token: None: not logged in.
            home: its HF_HOME, to have two processes on one machine; a new folder unless given.
            more: as they are, for instance `HF_HUB_DISABLE_XET="1"`.
        """
        home = home or Path(tempfile.mkdtemp(prefix="home-", dir=self.root))
        others = "HF_|HUGGING_?FACE|DIFFUSERS_|TRANSFORMERS_|.*_PROXY$"
        own = {name: value for name, value in os.environ.items() if not re.match(others, name, re.IGNORECASE)}
        own |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
        own |= {"NO_PROXY": "*", "no_proxy": "*"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        own |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_XET_TELEMETRY_ENABLED": "0"}
        own |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        return own | ({"HF_TOKEN": token} if token else {}) | more

    def fail(
        self,
        where: str,
        status: int | None = None,
        *,
        times: int | None = 1,
        message: str = "a fault of the tests",
        retry_after: float | None = None,
        delay: float = 0,
        drop: Literal["request", "body", "answer", "half"] | None = None,
        reset: bool = True,
    ) -> Fault:
        """Make the next requests fail.

        Args:
            where: the name of a route, which is that of a method of `Routes`, or a regular expression that is looked
                for in "METHOD /path": "commit" or "POST .*/commit/main$".
            status: answered in place of what was asked, which is not done.
            times: how many requests; None: all until `clear()`.
            retry_after: seconds, for the header that 429 and 503 may have.
            delay: seconds to wait first; alone, the request is then served.
            drop: the connection ends. "request": when the headers were read; "body": in the middle of the request's
                body; "answer": when all was done that was asked; "half": in the middle of the answer's body.
            reset: it ends by a reset, of which the client makes another error than of an end in good order.
        """
        if where.isidentifier() and where not in Routes.names():
            raise ValueError(f"No route is called {where!r}; there are {', '.join(sorted(Routes.names()))}")
        headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
        fault = Fault(where, times, status, message, headers, delay, drop, reset)
        with self.lock:
            self.faults.append(fault)
        return fault

    def calls(self, route: str | None) -> list[Request]:
        """The requests so far for one route; for None, those that nothing serves."""
        with self.lock:
            return [request for request in self.requests if request.route == route]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", hub.port), Handler)

    def process_request(self, request: Any, address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is none of our errors
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """A connection: reads requests, has them answered, and cuts where a fault says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    call: Request

    def serve(self) -> None:
        url = urlsplit(self.path)
        name = Routes.find(f"{self.command} {url.path}")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub = self.server.hub
        self.call = Request(self.command, url.path, parse_qs(url.query), name, headers)
        with self.hub.lock:
            self.hub.requests.append(self.call)
            fault = next((fault for fault in self.hub.faults if fault.meets(self.call)), None)
            if fault is not None:
                fault.hits += 1
        try:
            self.take(fault)
            answer = self.answer(fault)
            self.send(answer, fault)
        except Dropped:
            self.cut(reset=fault is None or fault.reset)
        finally:
            if self.hub.verbose:
                print(f"{self.call.status or 'cut'} {self.command} {self.path}", file=sys.stderr)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def take(self, fault: Fault | None) -> None:
        if fault is not None:
            time.sleep(fault.delay)
            if fault.drop == "request":
                raise Dropped
        self.call.body = self.read_body(half=fault is not None and fault.drop == "body")

    def answer(self, fault: Fault | None) -> Answer:
        try:
            if fault is not None and fault.status is not None:
                raise Refused(fault.status, fault.message, headers=fault.headers)
            return Routes(self.hub, self.call).answer()
        except Refused as problem:
            return Answer(problem.json, problem.status, problem.headers)
        except Exception:
            self.hub.errors.append(traceback.format_exc())
            return Answer({"error": self.hub.errors[-1]}, 500)

    def send(self, answer: Answer, fault: Fault | None) -> None:
        drop = fault.drop if fault else None
        if drop == "answer":
            raise Dropped
        self.call.status = answer.status  # now: the client may be quicker than this thread
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json; charset=utf-8"
        self.send_response(answer.status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Request-Id": uuid.uuid4().hex}
        for header, value in (headers | answer.headers).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if drop == "half" else body)
        if drop == "half":
            raise Dropped

    def read_body(self, half: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    raise Dropped
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size // 2 if half else size)
        if half or len(body) < size:  # the client may have gone first
            raise Dropped
        return body

    def cut(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for stream in (self.rfile, self.wfile, self.connection):  # the socket closes with the last of them
            stream.close()
        raise ConnectionResetError  # past all that would still write an answer, to Server.handle_error

    def log_message(self, *args: Any) -> None:
        """Nothing: `Hub.requests` has it all."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A Hugging Face Hub on this machine, in memory: it forgets when it ends."
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--user", default="user", help="the account that TOKEN belongs to")
    parser.add_argument("--token", default="hf_user")
    arguments = parser.parse_args()
    hub = Hub(arguments.port, verbose=True)
    hub.users = {arguments.token: User(arguments.user)}
    own = hub.env(arguments.token)
    os.environ["HF_HOME"] = own["HF_HOME"]  # what hf_xet writes down while it serves stays out of the user's
    try:
        hub.start()
    except OSError as error:
        parser.error(f"port {arguments.port}: {error.strerror}")
    print("In another terminal:\n")
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "NO_PROXY"):
        print(f"export {name}={(own | {'HF_ENDPOINT': hub.endpoint})[name]}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    print(f"\nRepos are {arguments.user}/NAME. Control-C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    hub.close()


if __name__ == "__main__":
    main()
