"""Talk to an OpenAI-compatible server: one JSON text there, one back, and again where that helps.

Sent again, with a pause that doubles each time (or as long as Retry-After says): what got no answer, half of one or no
JSON, and what the server puts off (429, 500, 502, 503, 504). Any other status is the server's last word (`Refusal`).
Redirects are not followed: nothing goes to another address than the user named. The key of OPENAI_API_KEY goes into a
header, and nowhere else: in what the server says, as far as we say it again, it is hidden (`Client.hidden`).
"""

import contextlib
import email.utils
import html
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from gemma_dist.data.strict import short
from gemma_dist.errors import ConfigError

KEY = "OPENAI_API_KEY"
PUT_OFF = (429, 500, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
MOST_DOUBLINGS = 10  # of a pause, which has reached its bound then
MAX_BYTES = 64 * 2**20  # of an answer
MAX_WORDS = 400  # characters of what a server says, in our errors
MAX_DEPTH = 5  # levels of a value in our errors; `short` shows fewer


class Refusal(Exception):
    """The server answered with a status that asking again would not change."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status} {words}".strip())
        self.status, self.words = status, words


class Unanswered(Exception):
    """No answer that could be used came, however often the server was asked."""

    def __init__(self, words: str, num_tries: int = 1, status: int | None = None) -> None:
        """`status` is that of the last answer, if there was one."""
        super().__init__(f"{words} (sent {num_tries} times)" if num_tries > 1 else words)
        self.words, self.status = words, status


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    scheme: str
    host: str
    port: int | None
    path: str  # without a slash at its end

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.path}"


def parse_address(url: str) -> Address:
    """The address that a URL names. Raises ConfigError, without the URL where that may hold a secret."""
    remedy = "write it as http://localhost:8000/v1"
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--server is no URL: {error}; {remedy}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"--server takes neither a user nor a password nor anything behind ? or #: put a key into {KEY}, and "
            f"{remedy}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", parts.path):
        raise ConfigError(f"--server {short(url)} is no address of a server; {remedy}")
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))


def read_key() -> str | None:
    """The key of the environment, None where there is none. ConfigError, without it, where no header can carry it."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ConfigError(f"{KEY} holds blanks or signs that a header cannot carry; set it again, or unset it")
    return key or None


class Client:
    """Asks one server, from any number of threads, each over a connection of its own. Close it at the end."""

    def __init__(self, address: Address, key: str | None, *, timeout_s: float, max_retries: int) -> None:
        self.address, self.num_retries = address, 0
        self._key, self._timeout_s, self._max_retries = key, timeout_s, max_retries
        self._spellings = _spellings(key or "")
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._closed = threading.Event()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST.

        Raises:
            Refusal, Unanswered
        """
        data = json.dumps(body).encode()
        for attempt in range(self._max_retries + 1):
            pause = FIRST_PAUSE_S * 2 ** min(attempt, MOST_DOUBLINGS) * random.uniform(0.5, 1)
            status = None
            try:
                status, headers, answer = self._exchange("POST", path, data)
                if status == 200:
                    return self._object_of(answer)
                problem = f"{status} {self._words(answer)}".strip()
                if status not in PUT_OFF:
                    raise self._refusal(status, headers, answer)
                pause = _retry_after(headers.get("Retry-After")) or pause
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = self.hidden(f"{type(error).__name__}: {error}")
            if attempt == self._max_retries or self._closed.wait(min(pause, LONGEST_PAUSE_S)):
                break
            self.num_retries += 1
        raise Unanswered(problem, attempt + 1, status)

    def look(self, path: str) -> dict[str, Any]:
        """The answer to a GET, which waits for a server that is still loading, and for nothing else.

        Raises:
            Refusal, Unanswered
        """
        for attempt in range(self._max_retries + 1):
            try:
                status, headers, answer = self._exchange("GET", path, None)
                if status == 200:
                    return self._object_of(answer)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise Unanswered(self.hidden(f"{type(error).__name__}: {error}")) from None
            pause = _retry_after(headers.get("Retry-After")) or FIRST_PAUSE_S * 2 ** min(attempt, MOST_DOUBLINGS)
            if status not in (429, 503) or attempt == self._max_retries:
                break
            self._closed.wait(min(pause, LONGEST_PAUSE_S))
        raise self._refusal(status, headers, answer)

    def is_there(self) -> bool:
        """Whether the server says anything at all."""
        try:
            self._exchange("GET", "/models", None)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def rest(self) -> None:
        """Send nothing any more; what is under way may still be answered."""
        self._closed.set()

    def close(self) -> None:
        """End all that is under way, from any thread: what the server has not answered yet, it need not."""
        self._closed.set()
        for connection in self._connections:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of one request. OSError, HTTPException: there is none, or half of one."""
        if self._closed.is_set():
            raise ConnectionAbortedError("the run ended")
        connection = self._connection()
        was_open = connection.sock is not None
        try:
            return self._send(connection, method, path, data)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            if not was_open:
                raise
            return self._send(connection, method, path, data)  # the server had closed it meanwhile, as it may

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, data: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self.address.path + path, data, headers)
            response = connection.getresponse()
            if response.length is None:  # sent in chunks, or up to the end of the connection
                body = response.read(MAX_BYTES + 1)
            elif response.length <= MAX_BYTES:
                body = response.read()
            if (response.length or len(body)) > MAX_BYTES:
                raise http.client.HTTPException(f"an answer of more than {MAX_BYTES} bytes")
        except BaseException:
            connection.close()  # the next request opens it again
            raise
        return response.status, response.headers, body

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's."""
        if not hasattr(self._own, "connection"):
            kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
            self._own.connection = kind(self.address.host, self.address.port, timeout=self._timeout_s)
            self._connections.append(self._own.connection)
        return self._own.connection

    def _refusal(self, status: int, headers: http.client.HTTPMessage, answer: bytes) -> Refusal:
        words = self._words(answer)
        if 300 <= status < 400:
            place = urlsplit(headers.get("Location") or "")
            host = place.netloc.rpartition("@")[2]
            words = self.hidden(f"it sends us on to {place.scheme}://{host}{place.path}, where nothing is sent")
        return Refusal(status, words)

    def _words(self, answer: bytes) -> str:
        """What the server says is wrong, on one line."""
        text = self.hidden(answer.decode(errors="replace"))[: 2**16]
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
            for name in ("error", "message", "detail"):
                while isinstance(found, dict) and name in found:
                    found = found[name]
            text = found if isinstance(found, str) else json.dumps(self.hidden_in(found))
        if "<html" in text.lower():
            text = html.unescape(re.sub(r"(?is)<(style|script|head)\b.*?</\1>|<[^>]*>", " ", text))
        text = self.hidden(" ".join(text.split()))
        return text if len(text) <= MAX_WORDS else text[: MAX_WORDS - 3] + "..."

    def _object_of(self, answer: bytes) -> dict[str, Any]:
        """The JSON object of an answer. ValueError where it is none."""
        try:
            value = json.loads(answer, parse_int=_number)
        except (ValueError, RecursionError):
            begin = self.hidden(answer.decode(errors="replace"))[:200]
            raise ValueError(f"the answer is not JSON: {short(begin)}") from None
        if not isinstance(value, dict):
            raise ValueError(f"the answer is {short(self.hidden_in(value))}, not an object")
        return value

    def hidden(self, text: str) -> str:
        """The text without the key, for what we say. Hide before a text is cut: of half a key, nothing is known."""
        for spelling in self._spellings:
            text = text.replace(spelling, f"[{KEY}]")
        return text

    def hidden_in(self, value: object, depth: int = 0) -> object:
        """A JSON value without the key, and without what lies too deep for a message."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, (list, Mapping)) and depth == MAX_DEPTH:
            return "..."
        if isinstance(value, list):
            return [self.hidden_in(item, depth + 1) for item in value]
        if isinstance(value, Mapping):
            return {self.hidden(key): self.hidden_in(item, depth + 1) for key, item in value.items()}
        return value


def _spellings(key: str) -> list[str]:
    """How a key may stand in a text: as it is, and in JSON (some write a slash as \\/), Python, HTML and addresses."""
    in_json = json.dumps(key)[1:-1]
    kinds = {key, in_json, in_json.replace("/", "\\/"), json.dumps(in_json)[1:-1], repr(key)[1:-1], html.escape(key)}
    return sorted({*kinds, quote(key, safe="")} - {""}, key=len, reverse=True)


def _number(digits: str) -> int | float:
    """An integer of JSON; infinity, which no call may hold, where Python takes it for too long to read."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _retry_after(header: str | None) -> float | None:
    """How many seconds a server wants to be left alone: a number, or a date."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return None
