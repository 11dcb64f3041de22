"""`gemma-dist stats`: a corpus before it is trained on. Lengths, tools, duplicates, and what held-out rows it holds.

    stats = collect_stats(["train.jsonl"], ["held_out.jsonl"], None, RowConfig())
    print(stats.render())

Rows are read one at a time. Of each some 700 bytes stay (`fingerprints.py`), of each tool one declaration. A row that
breaks the data contract is counted by its reason, and the next one is read.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from gemma_dist.config import RowConfig
from gemma_dist.data.content import count_images
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.fit import encode_trained, parse
from gemma_dist.data.rows import read_rows
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import ConfigError, DataError, setting
from gemma_dist.logs import progress
from gemma_dist.shards.reader import is_shard_folder, open_shards, refuse_row_settings
from gemma_dist.show.duplicates import find_exact, find_near, find_overlap, find_same_prompt
from gemma_dist.show.fingerprints import Fingerprints, texts_of
from gemma_dist.show.stats_report import LENGTHS, NUM_BINS, TOKENS, CorpusStats, Refusal, Spread, Weights
from gemma_dist.show.tool_counts import ToolCounts

MAX_REASON_WORDS = 14


@dataclass
class _Corpus:
    """What is collected of the rows of some files or folders."""

    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    tools: ToolCounts = field(default_factory=ToolCounts)
    notes: Counter[str] = field(default_factory=Counter)
    weights: array = field(default_factory=lambda: array("d"))  # of rows
    refused: dict[str, Refusal] = field(default_factory=dict)
    numbers: dict[str, array] = field(default_factory=lambda: {name: array("q") for name in (*TOKENS, *LENGTHS)})

    @property
    def num_refused(self) -> int:
        """How many rows were refused, for whatever reason."""
        return sum(refusal.num_rows for refusal in self.refused.values())


@dataclass(frozen=True)
class _Row:
    """A row as it was read: parsed, or the reason why it is refused."""

    source: str  # file or folder
    line: int
    trajectory: Trajectory | DataError
    num_tokens: tuple[int, int, int] | None = None  # of text, of images, trained


def collect_stats(data: list[str], against: list[str], model: str | None, settings: RowConfig) -> CorpusStats:
    """What the rows of `data` are like, and which of them also stand in `against`.

    Args:
        data: files of rows, and folders or URLs of shards.
        against: more of them, such as held-out rows.
        model: whose tokens are counted in raw rows; None: they are not. Shards know theirs.

    Raises:
        ConfigError: rows are to be unrolled, and no model is named; or to be read otherwise, and all are in shards.
        DataError: a file cannot be read as a whole, or a shard is damaged.
    """
    if settings.unroll != "none" and not model:
        raise ConfigError(f"{setting('unroll', 'reasoning')} asks the model's chat template; name the model, too")
    if all(map(is_shard_folder, (*data, *against))):
        refuse_row_settings(data[0], settings)
    encoder = load_encoder(model, settings) if model else None
    corpus = _collect(data, encoder, settings)
    overlap = None
    if against:
        unrolls = settings.unroll != "none"
        other = _collect(against, encoder if unrolls else None, settings)
        overlap = find_overlap(corpus.fingerprints, other.fingerprints, against, other.num_refused)
    tokens, trained_tokens = corpus.numbers["tokens"], corpus.numbers["trained_tokens"]
    tools = corpus.tools.counts()
    return CorpusStats(
        data=data,
        num_rows=len(corpus.fingerprints),
        num_refused=corpus.num_refused,
        refused=dict(sorted(corpus.refused.items(), key=lambda item: -item[1].num_rows)),
        notes=dict(corpus.notes),
        num_encoded=len(tokens),
        trained_share=sum(trained_tokens) / sum(tokens) if tokens else None,
        per_row={name: _spread(numbers) for name, numbers in corpus.numbers.items() if numbers},
        tools=tools,
        never_called=[tool.name for tool in tools if not tool.num_calls],
        num_rows_without_declarations=corpus.tools.num_rows_without_declarations,
        exact=find_exact(corpus.fingerprints),
        near=find_near(corpus.fingerprints),
        same_prompt=find_same_prompt(corpus.fingerprints),
        against=overlap,
        weights=_weights(corpus.weights),
    )


def _weights(of_rows: array) -> Weights | None:
    """None: no row has one."""
    if all(weight == 1 for weight in of_rows):
        return None
    return Weights(sum(weight != 1 for weight in of_rows), min(of_rows), max(of_rows), sum(of_rows) / len(of_rows))


def _spread(numbers: array) -> Spread:
    """Sum, mean, percentiles and maximum of one number of each row."""
    values = np.array(numbers, np.int64)
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method="inverted_cdf").tolist()
    bins = np.histogram(values, NUM_BINS, (0, max(1, int(values.max()))))[0].tolist()
    return Spread(int(values.sum()), float(values.mean()), int(p50), int(p90), int(p99), int(values.max()), bins)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _collect(data: list[str], encoder: Encoder | None, settings: RowConfig) -> _Corpus:
    """Go once over all rows."""
    corpus = _Corpus()
    for path in data:
        with closing(progress(_read(path, encoder, settings), total=None, desc=path, unit=" rows")) as rows:
            for row in rows:
                _add(row, corpus)
    return corpus


def _read(path: str, encoder: Encoder | None, settings: RowConfig) -> Iterator[_Row]:
    """The rows of a file, or of a folder of shards."""
    if not is_shard_folder(path):
        return _read_raw(path, encoder, settings)
    refuse_row_settings(path, RowConfig(unroll=settings.unroll))  # the others may be for raw rows beside them
    return _read_shards(path)


def _read_shards(folder: str) -> Iterator[_Row]:
    """The rows of shards, which are encoded: row 0 is named folder:1."""
    shards = open_shards(folder)
    for index in range(len(shards)):
        counts = (shards.num_text_tokens[index], shards.num_image_tokens[index], shards.num_target_tokens[index])
        num_text, num_image, num_trained = map(int, counts)
        yield _Row(folder, index + 1, shards.read(index), (num_text, num_image, num_trained))


def _read_raw(path: str, encoder: Encoder | None, settings: RowConfig) -> Iterator[_Row]:
    """The rows of a file, parsed; with an encoder as the samples that `shard` makes of each, their tokens counted."""
    for where, raw in read_rows([path], settings.max_row_bytes):
        source = str(where.file)
        try:
            trajectory = parse(raw, where, settings)
            samples = [_Row(source, where.line, trajectory)]
            if encoder:
                with error_context(where):
                    samples = [
                        _Row(source, where.line, sample, _count_tokens(sample, encoder))
                        for sample in unroll(trajectory, encoder, settings)
                    ]
        except DataError as error:
            samples = [_Row(source, where.line, error)]
        yield from samples


def _count_tokens(sample: Trajectory, encoder: Encoder) -> tuple[int, int, int]:
    """Tokens of text, of images, and of those the trained ones."""
    encoded = encode_trained(sample, encoder)
    num_text = encoded.num_tokens - encoded.num_image_tokens
    return num_text, encoded.num_image_tokens, encoded.num_target_tokens


def _add(row: _Row, corpus: _Corpus) -> None:
    """Count a row."""
    place = f"{row.source}:{row.line}"
    trajectory = row.trajectory
    if isinstance(trajectory, DataError):
        why = reason_of(str(trajectory).removeprefix(f"{place}: "))
        corpus.refused.setdefault(why, Refusal(place)).num_rows += 1
        return
    corpus.fingerprints.add(trajectory, row.source, row.line)
    corpus.tools.add(trajectory, place)
    corpus.notes.update(trajectory.notes)
    corpus.weights.append(trajectory.weight)
    for name, number in _lengths(trajectory).items():
        corpus.numbers[name].append(number)
    if row.num_tokens:
        num_text, num_image, _ = row.num_tokens
        for name, number in zip(TOKENS, (num_text + num_image, *row.num_tokens), strict=True):
            corpus.numbers[name].append(number)


def _lengths(trajectory: Trajectory) -> dict[str, int]:
    """The numbers of LENGTHS of one row."""
    counts = dict.fromkeys(LENGTHS, 0)
    for message in trajectory.messages:
        counts["characters"] += sum(map(len, texts_of(message)))
        counts["messages"] += 1
        counts["user_turns"] += message["role"] == "user"
        counts["calls"] += len(message.get("tool_calls", []))
        counts["images"] += count_images(message)
    return counts


# ---- reasons ---------------------------------------------------------------------------------------------------------

_CONTEXT = re.compile(r"(turn \d+( \([^)]*\))?|tool \S+|call of \S+): ")
_QUOTED = re.compile(r"(?<!\w)('.*?'|\".*?\"|\[.*\]|\{.*\})(?!\w)")


def reason_of(error: str) -> str:
    """The first words of an error, without what differs from row to row: turns, names, values, numbers.

    "turn 3 (tool): content is ['a', 7]; write ..." -> "content is …"
    """
    while context := _CONTEXT.match(error):
        error = error[context.end() :]
    words = _QUOTED.sub("…", error)
    words = re.sub(r"\d+(,\d{3})*", "…", words)
    words = re.split(r"; |: ", words)[0]
    return " ".join(words.split()[:MAX_REASON_WORDS])
