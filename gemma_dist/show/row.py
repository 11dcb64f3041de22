"""One row as the model sees it: every token, and which of them are trained."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from gemma_dist.config import ShardConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.data.fit import encode_trained, fit, parse
from gemma_dist.data.places import ReadRow
from gemma_dist.data.rows import read_rows, row_of_sample
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory, name_row
from gemma_dist.data.types import Message
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import DataError, setting, spell
from gemma_dist.gemma_format import IMAGE, TURN
from gemma_dist.shards.reader import Shards, is_shard_folder, open_shards, refuse_row_settings
from gemma_dist.shards.report import OPTIONS
from gemma_dist.show.fingerprints import texts_of
from gemma_dist.visible import visible

TRAINED, TRAINED_END = "⟦", "⟧"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
NUM_PLACES_SHOWN = 10
UNROLLED = setting("unroll", "reasoning")
SOFT_TOKENS = re.compile(f"(?:{re.escape(IMAGE)}){{2,}}")


class Piece(NamedTuple):
    """Neighboring tokens of one kind in one turn."""

    turn: int  # how many turns have begun
    kind: int  # of `data/kinds.py`; 0: not trained
    is_image: bool  # the soft tokens of an image
    text: str
    num_tokens: int


@dataclass(frozen=True)
class Inspection:
    """Ids, labels (-100: not trained) and strings of the tokens of one row."""

    id: str
    ids: list[int]
    labels: list[int]
    tokens: list[str]  # each id decoded alone; a character that is split over several tokens reads U+FFFD in each
    segments: list[tuple[bool, str]]  # the text split where training begins and ends: (trained, text)
    num_text_tokens: int
    num_image_tokens: int
    num_images: int
    num_target_tokens: int
    notes: dict[str, int]  # what parsing and encoding changed or left out: how often
    added: list[str]  # what a chat template that is not known writes of its own, by turn
    enable_thinking: bool  # as the row is rendered
    samples: list[str]  # ids of all samples that a raw row makes
    weight: float  # by which its loss is multiplied
    pieces: list[Piece] = field(default_factory=list)  # the text once more, split by turns and by what is trained
    images: list[bytes] = field(default_factory=list)  # the files of its images
    cut: list[str] = field(default_factory=list)  # messages that were cut from its end for its length: role and words

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("segments", "pieces", "images")}

    def render(self, color: bool) -> str:
        """The row as text under a line of counts. Trained text stands in ⟦ ⟧, and is green with `color`; the soft
        tokens of an image are counted: `<|image|> x 256`. What the row itself has of these marks, and of all that
        would act on a terminal or hide there, is written out: `\\u27e6`."""
        num_tokens = len(self.ids)
        header = (
            f"{visible(self.id, keep='')}: {num_tokens:,} tokens = {self.num_text_tokens:,} text + "
            f"{self.num_image_tokens:,} image ({self.num_images} images); {self.num_target_tokens:,} trained; thinking "
            f"{'on' if self.enable_thinking else 'off'}"
        )
        if self.weight != 1:
            header += f"; weight {self.weight:g}"
        if len(self.samples) > 1:
            header += f"\none of the samples {visible(', '.join(self.samples), keep='')} of the row"
        for note, count in sorted(self.notes.items()):
            header += f"\n{count:,} x {visible(note)}"
        header += "".join(f"\n{visible(words)}" for words in self.added[:NUM_PLACES_SHOWN])
        if len(self.added) > NUM_PLACES_SHOWN:
            header += f"\nand in {len(self.added) - NUM_PLACES_SHOWN:,} more places, which the JSON of this row has"
        start, end = (GREEN + TRAINED, TRAINED_END + PLAIN) if color else (TRAINED, TRAINED_END)
        pieces = [f"{start}{_unmarked(text)}{end}" if trained else _unmarked(text) for trained, text in self.segments]
        text = SOFT_TOKENS.sub(lambda found: f"{IMAGE} x {len(found[0]) // len(IMAGE)}", "".join(pieces))
        return f"{header}\n\n{text}"


def _unmarked(text: str) -> str:
    """A row's text, which cannot pass for a mark of ours."""
    return visible(text).replace(TRAINED, "\\u27e6").replace(TRAINED_END, "\\u27e7")


def inspect_row(data: str | Path, model: str, row: int | str, settings: ShardConfig) -> Inspection:
    """One row of a shard folder, or of raw rows as `gemma-dist shard` would keep it. Of a raw row that makes several
    samples it is the one of the id, or else the last.

    Args:
        row: its number from 1, as messages print it behind the colon (of a shard folder the sample, of JSONL the line,
            blank ones included, of anything else the row); or its id.

    Raises:
        DataError: there is no such row, or several of this id; it breaks the data contract; it is longer than
            `settings.max_length`.
    """
    if is_shard_folder(data):
        refuse_row_settings(data, settings)
        shards = open_shards(data)
        trajectory = shards.read(_sample(shards, row))
        encoder = load_encoder(model, settings)
        encoded = encoder.encode(trajectory)
        samples, whole = [trajectory], trajectory
    else:
        limit = settings.max_row_bytes
        where, raw = (
            _raw_row_of_id(Path(data), row, limit) if isinstance(row, str) else _raw_row(Path(data), row, limit)
        )
        trajectory = parse(raw, where, settings)
        encoder = load_encoder(model, settings)
        with error_context(where):
            samples = unroll(trajectory, encoder, settings)
            whole = trajectory = _sample_of(samples, row)
            encoded = encode_trained(trajectory, encoder)
            fitting = fit(trajectory, encoded, encoder, settings)
            if fitting is None:
                raise DataError(
                    f"{encoded.num_tokens:,} tokens, but max_length is {settings.max_length:,}: `gemma-dist shard` "
                    f"drops this row; use {setting('max_length', encoded.num_tokens)} to see it"
                )
        trajectory, encoded = fitting
    ids, labels = encoded.input_ids, encoded.labels
    decode = encoder.tokenizer.decode
    return Inspection(
        id=trajectory.id,
        ids=ids,
        labels=labels,
        tokens=[decode([token]) for token in ids],
        segments=[(trained, decode(tokens)) for trained, tokens in _split_by_training(encoded)],
        num_text_tokens=len(ids) - encoded.num_image_tokens,
        num_image_tokens=encoded.num_image_tokens,
        num_images=encoded.num_images,
        num_target_tokens=encoded.num_target_tokens,
        notes={spell(note, OPTIONS): count for note, count in (trajectory.notes + encoded.notes).items()},
        added=list(map(str, encoded.added)),
        enable_thinking=encoded.enable_thinking,
        samples=[sample.id for sample in samples],
        weight=trajectory.weight,
        pieces=list(_pieces(encoded, encoder)),
        images=trajectory.images,
        cut=[_said(message) for message in whole.messages[len(trajectory.messages) :]],
    )


def _said(message: Message) -> str:
    """Who says what."""
    return f"{message['role']}: {' '.join(filter(None, texts_of(message)))}"


def _pieces(encoded: Encoded, encoder: Encoder) -> Iterator[Piece]:
    """The tokens, those of one turn and one kind together."""
    [turn_id] = encoder.tokenizer.convert_tokens_to_ids([TURN])
    turns = accumulate(token == turn_id for token in encoded.input_ids)
    columns = zip(turns, encoded.kinds, map(bool, encoded.mm_token_type_ids), encoded.input_ids, strict=True)
    for (turn, kind, is_image), group in groupby(columns, lambda column: column[:3]):
        tokens = [column[3] for column in group]
        yield Piece(turn, kind, is_image, encoder.tokenizer.decode(tokens), len(tokens))


def _split_by_training(encoded: Encoded) -> Iterator[tuple[bool, list[int]]]:
    """The token ids in segments that are trained as a whole or not at all."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for trained, segment in groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        yield trained, [token for token, _ in segment]


def _sample(shards: Shards, row: int | str) -> int:
    """The index of the sample of a number, from 1, or of an id."""
    (folder,) = shards.folders
    if isinstance(row, int):
        if not 1 <= row <= len(shards):
            raise _no_row(folder, row, len(shards))
        return row - 1
    row_id = row.encode(errors="backslashreplace").decode()  # a word of the command line may be no UTF-8
    found = shards.find({row_id}).get(row_id, [])
    _require_one(folder, row_id, [shards.place(index) for index in found])
    return found[0]


def _raw_row(data: Path, row: int, max_row_bytes: int) -> ReadRow:
    """Place and content of a raw row. Those before it need not be valid."""
    last = 0
    for where, found in read_rows([data], max_row_bytes):
        if where.line == row:
            return where, found
        if where.line > row >= 1:
            raise DataError(f"{data}:{row} is a blank line; the row after it is {where.line}")
        last = where.line
    raise _no_row(data, row, last)


def _raw_row_of_id(data: Path, row_id: str, max_row_bytes: int) -> ReadRow:
    """Place and content of the raw row of this id, or whose sample has it. Invalid rows are passed over."""
    found: dict[str, list[ReadRow]] = {row_of_sample(row_id): [], row_id: []}
    for where, row in read_rows([data], max_row_bytes):
        with suppress(DataError):
            if isinstance(row, dict) and (name := name_row(row.get("id"), where)) in found:
                found[name].append((where, row))
    rows = found[row_id] or found[row_of_sample(row_id)]
    _require_one(data, row_id, [str(where) for where, _ in rows])
    return rows[0]


def _sample_of(samples: list[Trajectory], row: int | str) -> Trajectory:
    """The sample of this id; of a row that is named by its number, the last."""
    if isinstance(row, int):
        return samples[-1]
    for sample in samples:
        if sample.id == row:
            return sample
    ids = ", ".join(sample.id for sample in samples)
    raise DataError(f"the row makes the samples {ids}, but not {row}; name one of them, or use {UNROLLED}")


def _no_row(data: Path | str, row: int, last: int) -> DataError:
    return DataError(f"{data} has no row {row}: rows are counted from 1, and the last one is {last}")


def _require_one(data: Path | str, row_id: str, places: list[str]) -> None:
    if not places:
        raise DataError(f"{data} has no row with the id {row_id!r}; check the spelling, or name the row by its number")
    if len(places) > 1:
        raise DataError(
            f"{data} has {len(places):,} rows with the id {row_id!r}: {', '.join(places[:NUM_PLACES_SHOWN])}; name the "
            "one you mean by its number"
        )
