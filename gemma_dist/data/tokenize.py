"""Text to token ids, by a tokenizer that anybody may have written.

A `tokenizer.json` may replace or drop words before it cuts the text (`normalizer`, `pre_tokenizer`), and its settings
may call any word the beginning of a text or of an image. So the ids of each text are read back, and must say the same.

Conversations repeat one another: tools, system texts, openings of turns. So a text is cut at control tokens where its
pieces have the ids that they have in it, and pieces that came before are neither tokenized nor read back again.
"""

import functools
import json
import re
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_dist.data.cuts import BLANK, find_cuts, find_word_cuts, types_of
from gemma_dist.data.strict import short
from gemma_dist.data.types import BackendTokenizer, Encoding
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.gemma_format import BOS, IMAGE, IMAGE_BEGIN, IMAGE_END, TOOL, TOOL_END, TURN

# What stands in rendered text by the tokenizer's word for it, whatever the chat template is.
_NAMED = {"bos_token": BOS, "image_token": IMAGE, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
AROUND = 40  # characters that an error shows
REMEDY = "take the tokenizer that the model was published with"
_DECODERS_OF_GEMMA = [
    {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_ROOM = 6_000_000  # characters of pieces that are remembered, some 20 MB with their tokens
_ROOM_OF_EACH = 100  # characters, that the bookkeeping of a piece takes

# (T, 3): of each token its id, how far from the end of the one before it begins (0, or -1 within a character), and how
# far from there it ends, in characters
Steps = npt.NDArray[np.int32]
_STEP = 12  # bytes of one
Tokens = npt.NDArray[np.int32]  # (3, T): of each token its id, and the characters [start, end) that it has a byte of


class TextTokenizer:
    """Text to tokens, with a memory. Threads may share it."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._backend = backend
        self._says = find_words(backend)
        self._cut = find_cuts(backend) if self._says else None
        self._known = _Memory(self._of_words)
        if self._cut:
            for pattern in reversed(find_word_cuts(backend)):
                self._known = _Memory(functools.partial(_of_parts, pattern.findall, self._known))
            self._known = _Memory(functools.partial(_of_parts, self._cut.split, self._known))

    def __call__(self, text: str) -> Tokens:
        """The tokens of a text. Raises DataError as `tokenize`."""
        if self._cut is None:
            return self._of_whole(text)
        pieces: list[str] = []
        for part in text.split(TOOL_END):  # declarations are taken whole: rows share them
            pieces += (part,) if part.startswith(TOOL) else self._cut.split(part)
            pieces.append(TOOL_END)
        pieces.pop()
        try:
            steps = b"".join(self._known.of(pieces))
        except DataError:  # which is to say where in the whole text
            return self._of_whole(text)
        return _placed(np.frombuffer(steps, np.int32).reshape(-1, 3))

    def _of_words(self, words: list[str]) -> list[bytes]:
        """The steps of each word, made at once: control tokens between them keep them apart."""
        assert self._says
        steps = _by_words(self._backend, self._says, TURN.join(words))
        if steps is None:
            raise DataError("a word's tokens do not say it")
        lengths = np.array([*map(len, words)]) + len(TURN)
        begins = steps[:, 2].cumsum() - steps[:, 2]
        firsts = begins.searchsorted(lengths.cumsum() - lengths).tolist()
        as_bytes = steps.tobytes()
        return [as_bytes[_STEP * first : _STEP * (end - 1)] for first, end in pairwise((*firsts, len(steps) + 1))]

    def _of_whole(self, text: str) -> Tokens:
        """The tokens of a text by the tokenizer itself. Raises DataError as `tokenize`."""
        steps = None if self._says is None else _by_words(self._backend, self._says, text)
        return _as_array(tokenize(self._backend, text)) if steps is None else _placed(steps)


def _of_parts(cut: Callable[[str], list[str]], known: "_Memory", texts: list[str]) -> list[bytes]:
    """The steps of each text, by the parts that it is cut into."""
    parts: list[str] = []
    ends = [0]
    for text in texts:
        parts += cut(text)
        ends.append(len(parts))
    found = known.of(parts)
    return [b"".join(found[start:end]) for start, end in pairwise(ends)]


class _Memory:
    """The steps of texts that came before, as bytes, which can be put together."""

    def __init__(self, make: Callable[[list[str]], list[bytes]]) -> None:
        self._make = make
        self._known: dict[str, bytes] = {}
        self._room = _ROOM

    def of(self, texts: list[str]) -> list[bytes]:
        """The steps of each text; those of all new ones are made at once."""
        known = self._known
        new = [*{*texts}.difference(known)]
        if new:
            known.update(zip(new, self._make(new), strict=True))
            self._room -= sum(map(len, new)) + _ROOM_OF_EACH * len(new)
            if self._room < 0:
                self._known, self._room = {}, _ROOM
        return [*map(known.__getitem__, texts)]


def _as_array(encoding: Encoding) -> Tokens:
    ids = encoding.ids
    tokens = np.empty((3, len(ids)), np.int32)
    tokens[0] = ids
    tokens[1:] = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids)).reshape(-1, 2).T
    return tokens


class Words:
    """What each token says, as its tokenizer's decoder writes it."""

    def __init__(self, backend: BackendTokenizer, says: Callable[[str], bytes]) -> None:
        self._backend, self._says = backend, says
        self._known: dict[int, bytes] = {}  # of those that were asked for

    def of(self, ids: list[int]) -> list[bytes]:
        """The word of each token."""
        known = self._known
        try:
            return [known[token] for token in ids]
        except KeyError:
            known |= {token: self._says(self._backend.id_to_token(token)) for token in ids if token not in known}
            return [known[token] for token in ids]


def find_words(backend: BackendTokenizer) -> Words | None:
    """What each token says, if a decoder is one of two that write each token by itself, and nothing moves the places of
    tokens afterwards, as a ByteLevel post-processor does that trims blanks; else None."""
    if not types_of(backend.post_processor) <= {"TemplateProcessing"}:
        return None
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if decoder.get("type") == "ByteLevel":
        return Words(backend, _by_byte_level)
    if decoder.get("decoders") == _DECODERS_OF_GEMMA:
        return Words(backend, _by_gemma)
    return None


def _by_gemma(token: str) -> bytes:
    is_byte = token.startswith("<0x") and re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(is_byte[1]) if is_byte else token.replace(BLANK, " ").encode()


def _by_byte_level(token: str) -> bytes:
    of_characters = bytes_of_characters()
    if all(character in of_characters for character in token):
        return bytes(of_characters[character] for character in token)
    return token.encode()  # an added one


@functools.cache
def bytes_of_characters() -> dict[str, int]:
    """The character that stands for each byte where a tokenizer works on bytes: itself, or the next one from 256 on
    where it does not show (`bytes_to_unicode` of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _by_words(backend: BackendTokenizer, words: Words, text: str) -> Steps | None:
    """The steps of a text, read back and placed by their words: a tokenizer takes as long again to say where each
    begins. None where the words do not say the text, or where the tokenizer fails: `tokenize` says why."""
    backend.no_padding()
    backend.no_truncation()
    try:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of its Rust is no Exception
        return None
    ids = encoding.ids
    found = words.of(ids)
    said = b"".join(found)
    if said != text.encode() or b"" in found:
        return None
    steps = np.zeros((len(ids), 3), np.int32)
    steps[:, 0] = ids
    steps[:, 2] = [*map(len, found)]
    if len(said) != len(text):  # characters of several bytes; a token may begin and end within one
        of_bytes = (np.frombuffer(said, np.uint8) & 0xC0 != 0x80).cumsum(dtype=np.int32)  # which character, from 1
        ends_in_bytes = steps[:, 2].cumsum()
        ends = of_bytes[ends_in_bytes - 1]
        steps[1:, 1] = of_bytes[ends_in_bytes[:-1]] - 1 - ends[:-1]
        steps[:, 2] = np.diff(ends, prepend=0)
    return steps


def _placed(steps: Steps) -> Tokens:
    ids, starts, lengths = steps.T
    ends = lengths.cumsum(dtype=np.int32)
    return np.stack((ids, ends - lengths + starts, ends))


def tokenize(backend: BackendTokenizer, text: str) -> Encoding:
    """As transformers' `tokenizer(text, add_special_tokens=False)`, which takes a third longer to hand it over.

    Raises:
        DataError: the ids say something else than the text, or the tokenizer's own expressions fail on it.
    """
    backend.no_padding()  # of another call
    backend.no_truncation()
    try:
        encoding = backend.encode(text, add_special_tokens=False)
        said = backend.decode(encoding.ids, skip_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        raise DataError(f"the tokenizer fails on this row: {error}; {REMEDY}") from None
    if said != text and said.replace(BLANK, " ") != text.replace(BLANK, " "):
        pairs = enumerate(zip(said, text, strict=False))
        start = next((index for index, (one, other) in pairs if one != other), min(len(said), len(text)))
        found, given = (short(one[start : start + AROUND]) for one in (said, text))
        raise DataError(f"the tokenizer makes ids of this row that say {found} where the text says {given}; {REMEDY}")
    return encoding


def require_tokens(processor: Any, folder: str) -> None:
    """Refuse a processor that has other words for what its chat template and its images begin with than Gemma's.

    Raises:
        CheckpointError: it does, which would put that word into every row.
    """
    for name, token in _NAMED.items():
        given = getattr(processor.tokenizer, name, None)
        if given != token:
            raise CheckpointError(
                f"the tokenizer of {folder!r} has the {name} {given!r}, Gemma's is {token!r}; {REMEDY}"
            )
