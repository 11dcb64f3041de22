"""What is kept of a row to recognize it: two hashes and a MinHash signature, some 700 bytes however long the row is.

    exact       of messages, tools and images. The ids of calls do not count: every run of an agent makes new ones.
    prompt      of the same, up to the first assistant message that is trained
    signature   of the words of the conversation, in runs of five (shingles). Two signatures agree in about the share
                of places in which the sets of shingles agree (Jaccard). The system message and the tools are left out:
                in many corpora they are the longest part of a row, and the same in all. An image, by the bytes
                of its file, weighs as much as IMAGE_WORDS words.

Everything is seeded: the same rows give the same bytes in every process.
"""

import hashlib
import json
import re
import zlib
from array import array
from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from gemma_dist.data.content import content_parts, count_images
from gemma_dist.data.served import is_target
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message

NUM_PERMUTATIONS = 128
SHINGLE = 5  # words
IMAGE_WORDS = 20
SHINGLES_AT_ONCE = 128  # in every order they take 128 KB, which stay in the cache of a core
# A letter of a script that is written without spaces (Thai to Khmer, Japanese, Chinese), or a run of others.
_ALONE = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_random = np.random.default_rng(0)
_SHINGLE_FACTORS = _random.integers(0, 2**63, SHINGLE, np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _random.integers(0, 2**63, NUM_PERMUTATIONS, np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, NUM_PERMUTATIONS, np.uint64)


class RowName(TypedDict):
    """How a report names a row, so that `inspect` can show it."""

    place: str  # file:line, or folder:number
    id: str


class Fingerprints:
    """Names and fingerprints of N rows."""

    def __init__(self) -> None:
        self._sources: list[str] = []  # files and folders, in the order of the rows
        self._source = array("i")  # (N,) number of the source
        self._line = array("q")  # (N,)
        self._ids: list[str] = []
        self._exact = array("Q")
        self._prompt = array("Q")
        self._signatures = array("I")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, trajectory: Trajectory, source: str, line: int) -> None:
        """Add a row, which stands at `line` of the file or folder `source`."""
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._source.append(len(self._sources) - 1)
        self._line.append(line)
        self._ids.append(trajectory.id)
        image_hashes = [hash_bytes(image) for image in trajectory.images]
        exact, prompt = hash_row(trajectory, image_hashes)
        self._exact.append(exact)
        self._prompt.append(prompt)
        self._signatures.frombytes(make_signature(_words(trajectory.messages, image_hashes)).tobytes())

    def name(self, row: int) -> RowName:
        """The name of row `row`, from 0."""
        return {"place": f"{self._sources[self._source[row]]}:{self._line[row]}", "id": self._ids[row]}

    @property
    def exact(self) -> np.ndarray:
        """(N,) uint64: equal where messages, tools and images are."""
        return np.asarray(self._exact, np.uint64)

    @property
    def prompt(self) -> np.ndarray:
        """(N,) uint64: equal where everything before the first assistant message is."""
        return np.asarray(self._prompt, np.uint64)

    @property
    def signatures(self) -> np.ndarray:
        """(N, NUM_PERMUTATIONS) uint32."""
        return np.asarray(self._signatures, np.uint32).reshape(-1, NUM_PERMUTATIONS)


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2: two of a million rows collide once in 30 million corpora."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def hash_row(trajectory: Trajectory, image_hashes: list[int]) -> tuple[int, int]:
    """Hashes of the whole row, and of what stands before the first answer that it trains. Tools and images count."""
    messages = trajectory.messages
    end = next(index for index, message in enumerate(messages) if is_target(message))
    num_images = sum(map(count_images, messages[:end]))
    plain = _without_ids(messages)
    whole = [plain, trajectory.tools, image_hashes, trajectory.enable_thinking]
    prompt = [plain[:end], trajectory.tools, image_hashes[:num_images]]
    return hash_json(whole), hash_json(prompt)


def hash_json(value: object) -> int:
    """The hash of a JSON value, in which the order of keys does not count."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _without_ids(messages: list[Message]) -> list[dict[str, object]]:
    """The messages with the number of each call, from 0 over the row, in the place of its id; content as parts."""
    numbers: dict[str, int] = {}
    num_calls = 0
    plain = []
    for message in messages:
        copy: dict[str, object] = {**message, "content": content_parts(message["content"])}
        if "tool_calls" in message:
            copy["tool_calls"] = [call["function"] for call in message["tool_calls"]]
            for call in message["tool_calls"]:
                numbers[call["id"]] = num_calls
                num_calls += 1
        if "tool_call_id" in message:
            copy["tool_call_id"] = numbers.get(message["tool_call_id"])
        plain.append(copy)
    return plain


def texts_of(message: Message) -> Iterator[str]:
    """Every string that a message says: reasoning, text, and its calls as name and JSON."""
    yield message.get("reasoning_content", "")
    for part in content_parts(message["content"]):
        if part["type"] == "text":
            yield part["text"]
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        yield json.dumps(call["function"]["arguments"], ensure_ascii=False, sort_keys=True)


def _words(messages: list[Message], image_hashes: list[int]) -> list[str]:
    """The words of all messages but the system's, each message's images behind its texts."""
    words: list[str] = []
    hashes = iter(image_hashes)
    for message in messages:
        images = [next(hashes) for _ in range(count_images(message))]
        if message["role"] != "system":
            for text in texts_of(message):
                words += _WORD.findall(text.lower())
            for image in images:
                words += [f"image {image} {number}" for number in range(IMAGE_WORDS)]
    return words


def make_signature(words: list[str]) -> np.ndarray:
    """(NUM_PERMUTATIONS,) uint32: the smallest hash of any shingle, under each of as many orders of all hashes."""
    hashes = np.zeros(max(len(words), SHINGLE), np.uint64)  # a shorter row is one shingle, filled up
    hashes[: len(words)] = [zlib.crc32(word.encode()) for word in words]
    num_shingles = len(hashes) - SHINGLE + 1
    shingles = np.zeros(num_shingles, np.uint64)
    for offset in range(SHINGLE):  # all products and sums are modulo 2^64
        shingles += hashes[offset : offset + num_shingles] * _SHINGLE_FACTORS[offset]
    shingles = np.unique(shingles ^ (shingles >> np.uint64(32)))
    smallest = np.full(NUM_PERMUTATIONS, np.iinfo(np.uint64).max)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        ordered = shingles[start : start + SHINGLES_AT_ONCE, None] * _FACTORS + _OFFSETS
        np.minimum(smallest, ordered.min(axis=0), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)
