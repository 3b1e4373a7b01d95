"""A Hugging Face Hub on 127.0.0.1: real HTTP for the real client, in memory, with faults.

It serves what `huggingface_hub` and `diffusers` call to create, push to and load model and Space
repositories: main and revisions by commit, private repositories, checked cards, both upload paths.
Without Xet (`HF_HUB_DISABLE_XET=1`) large files arrive by Git LFS in one PUT. With it, the client's
default, a token points `hf_xet` to `local://FOLDER`. Such a folder is open to one process at a
time, so each token gets its own: the server reads what a client wrote once a commit names it, and
fills a new folder for each reader. Anything else answers 501: branches, tags, pull requests,
multipart LFS, folders, copying, running a Space. Listings come in one page, and files without the
redirect to a content network. The rules for cards are the documented ones, not the Hub's own code.

    with Hub() as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.env("hf_user"), check=True)
        assert hub.repos["user/name"].files()["README.md"].startswith(b"---")

By hand: `python -m tests.support.loopback_hub --port 8000` prints what to export in another
    terminal.
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
    """A fault that some requests meet: see `Hub.fail`. `hits` counts them; `clear()` ends it."""

    where: str
    times: int | None
    status: int | None
    message: str
    headers: dict[str, str]
    delay: float
    drop: str | None
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
    """The connection has to be cut now."""


class Hub:
    """The server, its content and its faults. Use it in a `with` statement.

    Attributes:
        repos: "user/name" or "spaces/user/name" -> `Repo`.
        users: token -> `User`; at first "hf_user" of "user", "hf_reader" (a read token of the same
            user) and "hf_other" of "other".
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
        """Listen; after a `stop`, on the same port and with the same content."""
        assert self.server is None, "already started"
        self.server = Server(self)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse new connections and cut open ones, like a machine that is gone."""
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
        """The environment of a process for which this is the Hub, as on a separate machine.

        Args:
            token: None: not logged in.
            home: its HF_HOME, to put two processes on one machine; a new folder by default.
            more: further variables, for instance `HF_HUB_DISABLE_XET="1"`.
        """
        home = home or Path(tempfile.mkdtemp(prefix="home-", dir=self.root))
        others = "HF_|HUGGING_?FACE|DIFFUSERS_|TRANSFORMERS_|.*_PROXY$"
        env = {name: value for name, value in os.environ.items() if not re.match(others, name, re.IGNORECASE)}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
        env |= {"NO_PROXY": "*", "no_proxy": "*"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_XET_TELEMETRY_ENABLED": "0"}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        return env | ({"HF_TOKEN": token} if token else {}) | more

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
    ) -> Fault:
        """Make the next requests fail.

        Args:
            where: a method of `Routes`, or a regular expression that is searched in "METHOD /path":
                "commit" or "POST .*/commit/main$".
            status: of the response; the request is not served.
            times: how many requests; None: all until `clear()`.
            retry_after: seconds, for the header of 429 and 503.
            delay: seconds to wait first; alone, the request is served after them.
            drop: reset the connection. "request": after the headers; "body": in the middle of the
                request's body; "answer": after the request was served, before the response; "half":
                in the middle of the response's body.
        """
        if where.isidentifier() and where not in Routes.names():
            raise ValueError(f"No route is called {where!r}; there are {', '.join(sorted(Routes.names()))}")
        headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
        fault = Fault(where, times, status, message, headers, delay, drop)
        with self.lock:
            self.faults.append(fault)
        return fault

    def calls(self, route: str | None) -> list[Request]:
        """The requests so far for one route; for None, those that no route serves."""
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
        if not isinstance(sys.exception(), OSError):  # a client that went away is no error
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """A connection: reads requests, sends responses, and cuts where a fault says so."""

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
            self.cut()
        finally:
            if self.hub.verbose:
                print(f"{self.call.status or 'cut'} {self.command} {self.path}", file=sys.stderr)

    do_GET = do_HEAD = do_POST = do_PUT = serve

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
        self.call.status = answer.status  # before sending: the client may be faster than this thread
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
        if half or len(body) < size:  # the client may have closed first
            raise Dropped
        return body

    def cut(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for stream in (self.rfile, self.wfile, self.connection):  # closing the last one closes the socket
            stream.close()
        raise ConnectionResetError  # skips everything that would still write, up to Server.handle_error

    def log_message(self, *args: Any) -> None:
        """Log nothing: `Hub.requests` has it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A Hugging Face Hub on this machine, in memory; its content is lost when it ends."
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--user", default="user", help="the account that TOKEN belongs to")
    parser.add_argument("--token", default="hf_user")
    arguments = parser.parse_args()
    hub = Hub(arguments.port, verbose=True)
    hub.users = {arguments.token: User(arguments.user)}
    env = hub.env(arguments.token)
    os.environ["HF_HOME"] = env["HF_HOME"]  # keeps what hf_xet writes out of the user's
    try:
        hub.start()
    except OSError as error:
        parser.error(f"port {arguments.port}: {error.strerror}")
    print("In another terminal:\n")
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "NO_PROXY"):
        print(f"export {name}={(env | {'HF_ENDPOINT': hub.endpoint})[name]}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    print(f"\nRepos are {arguments.user}/NAME. Control-C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    hub.close()


if __name__ == "__main__":
    main()
