"""A stand-in for a server of models: answers as a test says, badly where it should, and remembers what it was asked."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny"
LISTING = {"data": [{"id": MODEL, "owned_by": "vllm", "max_model_len": 512}]}


@dataclass
class Reply:
    """What goes over the line. A body that is no bytes goes as JSON; `length` claims another length than it has."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    chunks: int | None = None  # it goes in chunks of so many bytes, without a length
    hangs: threading.Event | None = None  # nothing is said before it is set
    drops: bool = False  # the connection ends without a word
    ends: bool = False  # the connection ends behind the answer, which does not say so


@dataclass
class Asked:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class StandIn:
    """A server that is listening."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    most_at_a_time: int = 0
    at_work: int = 0

    @property
    def bodies(self) -> list[Any]:
        """Of all requests for answers."""
        return [one.body for one in self.asked if one.body is not None]


def message(content: Any = "Here.", calls: Any = None, finish: Any = "stop", **keys: Any) -> dict[str, Any]:
    """An answer to a request for chat."""
    said = {"role": "assistant", "content": content, "tool_calls": calls}
    choice = {"index": 0, "message": said, "finish_reason": finish, **keys}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 3}}


def called(name: Any, arguments: Any) -> dict[str, Any]:
    """An entry of `tool_calls`."""
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}


@contextlib.contextmanager
def standing_in(
    reply: Callable[[Asked], Reply], listing: Reply | None = None, page: Reply | None = None
) -> Iterator[StandIn]:
    """A server that answers requests for answers by `reply`, that for its models by `listing`, and that for what it
    knows (openapi.json) by `page`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a small answer is not to wait for a word of who asked

        def do_GET(self) -> None:
            stand_in.asked.append(Asked(self.path, dict(self.headers), None))
            missing = Reply({"detail": "Not Found"}, 404)
            known = {"/v1/models": listing or Reply(LISTING), "/openapi.json": page or missing}
            self._send(known.get(self.path, missing))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers), body)
            with lock:
                stand_in.asked.append(asked)
                stand_in.at_work += 1
                stand_in.most_at_a_time = max(stand_in.most_at_a_time, stand_in.at_work)
            try:
                self._send(reply(asked))
            finally:
                with lock:
                    stand_in.at_work -= 1

        def _send(self, reply: Reply) -> None:
            if reply.hangs:
                reply.hangs.wait(60)
            if reply.drops:
                self.close_connection = True
                return
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with contextlib.suppress(OSError):  # who asked may be gone
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.chunks:
                    self.send_header("Transfer-Encoding", "chunked")
                    pieces = [body[start : start + reply.chunks] for start in range(0, len(body), reply.chunks)]
                    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
                    body += b"" if reply.length is not None else b"0\r\n\r\n"
                else:
                    self.send_header("Content-Length", str(len(body) if reply.length is None else reply.length))
                self.end_headers()
                self.wfile.write(body)
            self.close_connection = self.close_connection or reply.ends or reply.length is not None

        def log_message(self, *_: Any) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """Silent: who asked may be gone."""

    server = Server(("127.0.0.1", 0), Handler)
    stand_in = StandIn(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
