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
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_dist.data.strict import short
from gemma_dist.data.types import BackendTokenizer, Encoding
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.gemma_format import BOS, CONTROL_TOKENS, IMAGE, IMAGE_BEGIN, IMAGE_END, TOOL, TOOL_END, TURN

# What stands in rendered text by the tokenizer's word for it, whatever the chat template is.
_NAMED = {"bos_token": BOS, "image_token": IMAGE, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
_BLANK = "\u2581"  # ▁, as which Gemma's tokenizer writes a blank, so that one of the text reads back as a blank
AROUND = 40  # characters that an error shows
REMEDY = "take the tokenizer that the model was published with"
_CUT_AT = [token for token in CONTROL_TOKENS if token != IMAGE]  # the soft tokens of an image come together
_BY_THEMSELVES = {"Sequence", "Split", "Digits", "ByteLevel"}  # pre-tokenizers that know nothing but their piece
_DECODERS_OF_GEMMA = [
    {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
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
        self._cut = find_cuts(backend)
        self._words = find_words(backend)
        self._known: dict[str, Tokens] = {}
        self._room = _ROOM

    def __call__(self, text: str) -> Tokens:
        """The tokens of a text. Raises DataError as `tokenize`."""
        if self._cut is None:
            return self._of_whole(text)
        known = self._known
        pieces: list[str] = []
        declared: list[tuple[str, int, int]] = []  # new declarations, and which pieces they are made of
        for part in text.split(TOOL_END):  # those that came before are taken whole: rows share them
            if part in known:
                pieces += part, TOOL_END
                continue
            first = len(pieces)
            pieces += self._cut.split(part)
            if part.startswith(TOOL):
                declared.append((part, first, len(pieces)))
            pieces.append(TOOL_END)
        pieces.pop()
        try:
            self._learn(pieces, known)
        except DataError:  # which is to say where in the whole text
            return self._of_whole(text)
        tokens, starts = _joined([*map(known.__getitem__, pieces)], pieces)
        for part, first, end in declared:
            known[part] = own = tokens[:, starts[first] : starts[end]].copy()
            own[1:] -= own[1, 0]
        self._forget([part for part, _, _ in declared])
        return tokens

    def _learn(self, pieces: list[str], known: dict[str, Tokens]) -> None:
        """Add the tokens of new pieces, made at once: control tokens between them keep them apart."""
        new = [*dict.fromkeys([piece for piece in pieces if piece not in known])]
        if not new:
            return
        tokens = self._of_whole(TURN.join(new))
        starts, num_tokens = _starts(new, len(TURN)), tokens.shape[1]
        firsts = np.append(np.searchsorted(tokens[1], starts), num_tokens + 1)
        tokens[1:] -= np.repeat(starts, np.diff(firsts))[:num_tokens]  # with the token behind each
        places = firsts.tolist()
        for piece, first, end in zip(new, places, places[1:], strict=False):
            known[piece] = tokens[:, first : end - 1]
        self._forget(new)

    def _forget(self, new: list[str]) -> None:
        """Start a new memory where these pieces fill the one that they went to."""
        self._room -= sum(map(len, new)) + _ROOM_OF_EACH * len(new)
        if self._room < 0:
            self._known, self._room = {}, _ROOM

    def _of_whole(self, text: str) -> Tokens:
        """The tokens of a text by the tokenizer itself. Raises DataError as `tokenize`."""
        tokens = None if self._words is None else _by_words(self._backend, self._words, text)
        return _as_array(tokenize(self._backend, text)) if tokens is None else tokens


def _joined(found: list[Tokens], pieces: list[str]) -> tuple[Tokens, list[int]]:
    """The tokens of a text from those of its pieces, and how many there are in front of each piece, and in all."""
    counts = [one.shape[1] for one in found]
    tokens = np.concatenate(found, axis=1)
    tokens[1:] += np.repeat(_starts(pieces), counts)
    return tokens, [*accumulate(counts, initial=0)]


def _starts(pieces: list[str], gap: int = 0) -> npt.NDArray[np.int32]:
    """Where each piece begins in the text of all, with so many characters between two."""
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces)) + np.int32(gap)
    return np.cumsum(lengths, dtype=np.int32) - lengths


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
    if not _types_of(backend.post_processor) <= {"TemplateProcessing"}:
        return None
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if decoder.get("type") == "ByteLevel":
        return Words(backend, _by_byte_level)
    if decoder.get("decoders") == _DECODERS_OF_GEMMA:
        return Words(backend, _by_gemma)
    return None


def _by_gemma(token: str) -> bytes:
    is_byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(is_byte[1]) if is_byte else token.replace(_BLANK, " ").encode()


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


def _by_words(backend: BackendTokenizer, words: Words, text: str) -> Tokens | None:
    """The tokens of a text, read back and placed by their words: a tokenizer takes as long again to say where each
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
    tokens = np.empty((3, len(ids)), np.int32)
    tokens[0] = ids
    ends = np.cumsum(np.fromiter(map(len, found), np.int32, len(ids)), dtype=np.int32)
    if len(said) != len(text):  # characters of several bytes; a token may begin and end within one
        of_bytes = np.cumsum(np.frombuffer(said, np.uint8) & 0xC0 != 0x80, dtype=np.int32)
        tokens[1, 1:] = of_bytes[ends[:-1]] - 1
        tokens[2] = of_bytes[ends - 1]
    else:
        tokens[1, 1:], tokens[2] = ends[:-1], ends
    tokens[1, :1] = 0
    return tokens


def find_cuts(backend: BackendTokenizer) -> re.Pattern[str] | None:
    """Where a text may be cut so that each piece has the tokens that it has in the text; None: nowhere for sure.

    A tokenizer first takes the tokens that were added to its vocabulary out of the text as it is given: from left to
    right, at each place the longest. What stands between two of them is normalized, split and merged by itself. So a
    text may be cut in front of and behind each of _CUT_AT if

    - it is such a token, is always taken, and no other one takes its place: none holds it, or ends as it begins;
    - no added token looks at what stands around it, or takes blanks along;
    - nothing else looks beyond a piece: the pre-tokenizer is of those that do not, a post-processor only adds special
      tokens, which nobody asks for, and BPE merges without chance.
    """
    added = list(backend.get_added_tokens_decoder().values())
    taken = [token.content for token in added if not token.normalized]
    is_sure = (
        not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not backend.encode_special_tokens
        and set(_CUT_AT) <= set(taken)
        and not any(_takes_place(other, token) for token in _CUT_AT for other in taken)
        and _types_of(backend.pre_tokenizer) <= _BY_THEMSELVES
        and _types_of(backend.post_processor) <= {"TemplateProcessing"}
        and type(backend.model).__name__ == "BPE"
        and not backend.model.dropout
    )
    return re.compile(f"({'|'.join(map(re.escape, _CUT_AT))})") if is_sure else None


def _takes_place(other: str, token: str) -> bool:
    """Whether a text in which `token` begins may hold `other` there, or from further left on."""
    is_longer = token in other and token != other
    return is_longer or any(token.startswith(other[start:]) for start in range(1, len(other)))


def _types_of(part: Any) -> set[str]:
    """The types of a part of a tokenizer, and of the parts in it, as in `tokenizer.json`."""
    found: set[str] = set()
    left = [json.loads(part.__getstate__())] if part else []
    for state in left:
        found.add(state["type"])
        left += state.get("pretokenizers", [])
    return found


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
    if said != text and said.replace(_BLANK, " ") != text.replace(_BLANK, " "):
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
