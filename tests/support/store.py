"""A real HTTP server with ranges, as a store of shards that can be told to fail."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Files by name, with ranges; the next requests can be told to go wrong."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []  # name and range of each GET
        self.trouble: list[str] = []  # of the next ones: 503, 404, short, flip
        self.pause_s = 0.0
        self.refusal: tuple[int, str] | None = None  # status and code, as S3 says them of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _refuse(self) -> bool:
        """As S3 does, if the server was told to: HEAD gets no code."""
        if self.server.refusal is None:
            return False
        status, code = self.server.refusal
        body = f"<Error><Code>{code}</Code><Message>Words of {code}.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        return True

    def do_GET(self) -> None:
        if self._refuse():
            return
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.requests.append((name, wanted))
        time.sleep(self.server.pause_s)
        trouble = self.server.trouble.pop(0) if self.server.trouble else ""
        data = self.server.files.get(name)
        if data is None or trouble.isdigit():
            self.send_error(int(trouble) if trouble else 404)
            return
        if wanted and self.server.ranges:
            start, end = wanted.removeprefix("bytes=").split("-")
            end = str(min(int(end), len(data) - 1))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[int(start) : int(end) + 1]
        else:
            self.send_response(200)
        if trouble == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if trouble == "short" else data)
        if trouble == "short":
            self.close_connection = True

    def do_HEAD(self) -> None:
        if self._refuse():
            return
        data = self.server.files.get(self.path.lstrip("/"))
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
