"""Text to token ids, by a tokenizer that anybody may have written.

A `tokenizer.json` may replace or drop words before it cuts the text (`normalizer`, `pre_tokenizer`), and its settings
may call any word the beginning of a text or of an image. So the ids of each text are read back, and must say the same.

Conversations repeat one another: tools, system texts, openings of turns, words. So a text is cut where its parts have
the ids that they have in it (`cuts.py`): into what stands between control tokens, into words, and those into parts.
What came before is neither tokenized nor read back again.
"""

import functools
import json
import re
from array import array
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_dist.data.cuts import BLANK, find_cuts, find_word_cuts, types_of
from gemma_dist.data.strict import short
from gemma_dist.data.types import BackendTokenizer, Encoding
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.gemma_format import BOS, IMAGE, IMAGE_BEGIN, IMAGE_END, TOOL, TOOL_END

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

Tokens = npt.NDArray[np.int32]  # (3, T): of each token its id, and the characters [start, end) that it has a byte of


class TextTokenizer:
    """Text to tokens, with a memory. Threads may share it."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._backend = backend
        self._says = find_words(backend)
        self._cut = find_cuts(backend) if self._says else None
        self._known = _Memory(self._of_words)
        self._cuts_words: list[re.Pattern[str]] = []
        if self._cut:
            self._model, self._cuts_words = backend.model, find_word_cuts(backend)
            added = (token.content.replace(" ", BLANK) for token in backend.get_added_tokens_decoder().values())
            self._added = re.compile("|".join(map(re.escape, added)))
            for pattern in reversed(self._cuts_words):
                self._known = _Memory(functools.partial(_of_parts, pattern.findall, self._known))
            self._known = _Memory(functools.partial(_of_parts, self._cut.split, self._known))

    def __reduce__(self) -> tuple[Any, ...]:  # without its memory, which another process makes anew
        return TextTokenizer, (self._backend,)

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
        return _placed(steps)

    def _of_words(self, words: list[str]) -> list[bytes]:
        """The steps (`_placed`) of each word, or of each piece where words are not cut."""
        return [*map(self._steps, words)]

    def _steps(self, text: str) -> bytes:
        """The steps of a text, read back and placed by what its tokens say: a tokenizer takes as long again to say
        where each begins. DataError where they do not say the text, or the tokenizer fails: `tokenize` says why."""
        assert self._says
        try:
            ids = self._ids(text)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic of its Rust is no Exception
            raise DataError("the tokenizer fails") from None
        says = self._says.of(ids)
        if b"".join(says) != text.encode() or b"" in says:
            raise DataError("the ids say something else")
        steps = array("i")
        if text.isascii():
            for token, said in zip(ids, says, strict=True):
                steps.extend((token, 0, len(said)))
        else:  # a token may begin and end within a character
            for token, said in zip(ids, says, strict=True):
                steps.extend((token, -_is_inside(said[0]), len(said) - sum(map(_is_inside, said))))
        return steps.tobytes()

    def _ids(self, text: str) -> list[int]:
        normal = text.replace(" ", BLANK)
        if self._cuts_words and not self._added.search(normal):  # then nothing but the model has a part in it
            return [token.id for token in self._model.tokenize(normal)]
        self._backend.no_padding()
        self._backend.no_truncation()
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _of_whole(self, text: str) -> Tokens:
        """The tokens of a text by the tokenizer itself. Raises DataError as `tokenize`."""
        if self._says is not None:
            with suppress(DataError):
                return _placed(self._steps(text))
        return _as_array(tokenize(self._backend, text))


def _is_inside(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


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
    """The steps of texts that came before (`_placed`)."""

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


def _placed(steps: bytes) -> Tokens:
    """Tokens by their steps: of each its id, how far from the end of the one before it begins (0, or -1 within a
    character), and how far from there it ends, in characters, as int32. Steps can be put together as they are."""
    ids, gaps, lengths = np.frombuffer(steps, np.int32).reshape(-1, 3).T
    ends = lengths.cumsum(dtype=np.int32)
    return np.stack((ids, ends - lengths + gaps, ends))


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
