"""Shard folders, open for reading: samples 0 … N-1 in row groups 0 … R-1, checked byte by byte.

    shards = open_shards(Path("shards/train"), "s3://bucket/more")
    shards.read(17).messages

No byte of a shard is trusted: a local file's size and footer are checked when it is first touched, each row group
before it is parsed. A row group costs one request; what parquet needs to know beside it is in the manifest.
"""

import hashlib
import io
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.config_data import EncodingConfig, WeightsByStep
from gemma_dist.data.bfcl import read_with_answers
from gemma_dist.data.encode import Encoder
from gemma_dist.data.fit import parse
from gemma_dist.data.inputs import HUB
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.errors import ConfigError, DataError, setting
from gemma_dist.shards.fetch import Fetcher, FetchError, StoreRefusalError, is_url, join
from gemma_dist.shards.manifest import COUNTS, MANIFEST, UNFINISHED, Manifest, ShardEntry, has_digest, read_manifest

NUM_IDS_SHOWN = 50
THINKING = {  # how shards may have been made, and how a command says the same
    "auto": setting("enable_thinking", "auto"),
    "true": setting("enable_thinking", "true"),
    "false": setting("enable_thinking", "false"),
}
NUM_LOOKING = 16  # files at a time: a store answers slowly, but many at once
NUM_CACHED_ROW_GROUPS = 8  # of those that are read one sample at a time


class Shards:
    """One or more open shard folders: N samples in R row groups, folder by folder. Safe to read from several threads.

    `num_text_tokens`, `num_image_tokens`, `num_images` and `num_target_tokens` are int32 arrays (N,); those of a
    single folder lie in its memory-mapped manifest. `row_group_bytes` and `row_group_samples` are (R,).
    """

    def __init__(self, folders: list[str], weights: WeightsByStep | None, fetcher: Fetcher) -> None:
        """Raises DataError: no finished shard folder, a damaged manifest, or folders of different encodings."""
        self.folders, self.weights, self._fetcher = folders, weights, fetcher
        self._manifests = [_open_manifest(folder, fetcher) for folder in folders]
        headers = [manifest.header for manifest in self._manifests]
        if len({header["fingerprint"] for header in headers}) > 1:
            found = ", ".join(f"{folder} ({h['fingerprint']})" for folder, h in zip(folders, headers, strict=True))
            raise DataError(
                f"the shards were made with different tokenizers, chat templates or image processors: {found}; "
                "make them again with the same model, template and enable_thinking"
            )
        self.fingerprint: str = headers[0]["fingerprint"]
        self._settings = headers[0]["settings"]
        self._first_row_group = np.cumsum([0, *(manifest.table.num_rows for manifest in self._manifests)])
        self.row_group_bytes = self._joined([m.row_groups("num_bytes") for m in self._manifests])
        self.row_group_samples = self._joined([m.row_groups("num_samples") for m in self._manifests])
        self.first_sample = np.concatenate([[0], np.cumsum(self.row_group_samples)])  # (R+1,): of each row group
        counts = {name: self._joined([m.samples(name) for m in self._manifests]) for name in COUNTS}
        self.num_text_tokens: np.ndarray = counts["num_text_tokens"]
        self.num_image_tokens: np.ndarray = counts["num_image_tokens"]
        self.num_images: np.ndarray = counts["num_images"]
        self.num_target_tokens: np.ndarray = counts["num_target_tokens"]
        of_rows = [manifest.weights for manifest in self._manifests]
        self.row_weights: np.ndarray | None = None  # (N,) float64, by which losses are multiplied; None: all are 1
        if any(of_folder is not None for of_folder in of_rows):
            sizes = [len(manifest.ids) for manifest in self._manifests]
            self.row_weights = self._joined(
                [np.ones(size) if one is None else one for one, size in zip(of_rows, sizes, strict=True)]
            )
        self._ids = pa.chunked_array([manifest.ids for manifest in self._manifests])
        self._lock = threading.Lock()
        self._footers: dict[tuple[int, int], pq.FileMetaData] = {}
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()  # least recently used first

    def require_encoding(self, encoder: Encoder) -> None:
        """Raises DataError where `encoder` would not give the tokens that the shards were measured with."""
        if self.fingerprint == encoder.fingerprint:
            return
        remedy = ""
        thinking = str(self._settings.get("enable_thinking")).lower()
        if thinking in THINKING and thinking != str(encoder.enable_thinking).lower():
            remedy = f"use {THINKING[thinking]}, as they were made, or "
        raise DataError(
            f"{', '.join(self.folders)}: sharded with another tokenizer, chat template, image processor or "
            f"enable_thinking than this run's (fingerprint {self.fingerprint}, here {encoder.fingerprint}), so the "
            f"lengths do not hold; {remedy}run `gemma-dist shard` again with this model and template (also where an "
            "earlier version made the shards)"
        )

    def __len__(self) -> int:
        """Samples of all folders together."""
        return int(self.first_sample[-1])

    @cached_property
    def manifest_hash(self) -> str:
        """What a checkpoint notes of its corpus: equal where all samples, their order and their encoding are."""
        return hashlib.sha256("".join(manifest.sha256 for manifest in self._manifests).encode()).hexdigest()[:16]

    @property
    def num_row_groups(self) -> list[int]:
        """Of each folder."""
        return np.diff(self._first_row_group).tolist()

    def beginnings(self, num_row_groups: list[int]) -> list[str]:
        """What each folder's first row groups are known by: equal where their rows and the order of them are."""
        counted = zip(self._manifests, num_row_groups, strict=True)
        return [manifest.beginning(number) for manifest, number in counted]

    def id(self, index: int) -> str:
        """The id of sample `index`, from the manifests: no shard is read."""
        return self._ids[int(index)].as_py()

    def find(self, names: set[str]) -> dict[str, list[int]]:
        """The samples that each name stands for, if any: an id, or a row group as messages name it."""
        found: dict[str, list[int]] = {}
        has_name = pc.is_in(self._ids, pa.array(sorted(names), pa.large_string()))
        for index in np.flatnonzero(has_name).tolist():
            found.setdefault(self.id(index), []).append(index)
        if any(", row group " in name for name in names):
            for row_group in range(len(self.row_group_samples)):
                if (place := self._place(row_group)) in names:
                    found[place] = list(range(*self.first_sample[row_group : row_group + 2].tolist()))
        return found

    def sources(self) -> tuple[list[list[range]], WeightsByStep]:
        """Row groups of each folder of each source of a mixture, and their weights; without weights the whole corpus is
        the only source."""
        folders = [range(first, end) for first, end in pairwise(self._first_row_group.tolist())]
        if self.weights is None:
            return [folders], [(0, [1.0])]
        return [[folder] for folder in folders], self.weights

    def row_group_of(self, index: int) -> int:
        """The row group that sample `index` lies in."""
        return bisect_right(self.first_sample, index) - 1  # numpy's own gives up the interpreter's lock for it

    def place(self, index: int) -> str:
        """Where sample `index` lies, for messages: the folder, and the number of the sample in it, from 1."""
        folder, _ = self._find(self.row_group_of(index))
        return f"{self.folders[folder]}:{index - self.first_sample[self._first_row_group[folder]] + 1}"

    def read(self, index: int) -> Trajectory:
        """Sample `index`. DataError, with shard, row group and ids, where the stored bytes are damaged."""
        row_group = self.row_group_of(index)
        with self._lock:
            table = self._tables.pop(row_group, None)
        if table is None:
            table = self.read_row_group(row_group)
        with self._lock:
            self._tables[row_group] = table
            while len(self._tables) > NUM_CACHED_ROW_GROUPS:
                self._tables.popitem(last=False)
        return self.trajectory(table, index)

    def trajectory(self, table: pa.Table, index: int) -> Trajectory:
        """Sample `index` from its row group, as `read_row_group` gave it."""
        number = index - int(self.first_sample[self.row_group_of(index)])
        row = {name: column[number].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}
        return Trajectory(
            id=row["id"],
            messages=json.loads(row["messages"]),
            tools=json.loads(row["tools"]),
            images=[image["bytes"] for image in row["images"]],
            enable_thinking=row.get("enable_thinking"),  # folders of earlier versions have no such column
            weight=1.0 if self.row_weights is None else float(self.row_weights[index]),
        )

    def read_row_group(self, row_group: int) -> pa.Table:
        """The checked rows of a row group. DataError, with shard, row group and ids, where its bytes are damaged."""
        try:
            return self._read_row_group(row_group)
        except StoreRefusalError as error:
            raise DataError(f"{self._place(row_group)} was not given: {error}, and run the same again") from error
        except (_DamagedError, FetchError, OSError, pa.ArrowException) as error:
            first, end = self.first_sample[row_group : row_group + 2].tolist()
            ids = [self.id(index) for index in range(first, min(end, first + NUM_IDS_SHOWN))]
            num_more = end - first - len(ids)
            more = f" and {num_more:,} more" if num_more else ""
            raise DataError(
                f"{self._place(row_group)}: {error}. It holds the samples {', '.join(ids)}{more}. Restore the file "
                "from its source, make the shards again, or train without these samples: write the line\n"
                f"    {self._place(row_group)}\ninto a file and use {setting('quarantine', 'FILE')}"
            ) from error

    def _read_row_group(self, row_group: int) -> pa.Table:
        """The rows of a row group, from one ranged request: the manifest holds the footers, which parquet reads first.

        A local shard is looked at as a whole when its first row group is read.
        """
        folder, number = self._find(row_group)
        manifest = self._manifests[folder]
        shard, place = manifest.place(number)
        entry = manifest.header["shards"][shard]
        path = join(self.folders[folder], entry["name"])
        footer = self._footers.get((folder, shard))
        if footer is None:
            raw = manifest.footer(shard)
            if not is_url(path):
                _check_file(path, entry, raw)
            footer = self._footers[folder, shard] = pq.read_metadata(pa.BufferReader(b"PAR1" + raw))
        data = self._fetcher.read(path, *place)
        number_in_shard = number - int(np.searchsorted(manifest.row_groups("shard"), shard))
        with pq.ParquetFile(_Window(data, place.offset), metadata=footer) as parquet:
            return parquet.read_row_group(number_in_shard)

    def check_files(self, share: int = 0, num_shares: int = 1) -> list[str]:
        """Look at every `num_shares`th shard, from number `share` on: whether it is there, can be read, and has the
        size and, on a local disk, the footer of its manifest. No row group is read. What is wrong, in words."""
        named = [
            (join(folder, entry["name"]), entry, manifest, number)
            for folder, manifest in zip(self.folders, self._manifests, strict=True)
            for number, entry in enumerate(manifest.header["shards"])
        ]

        def look(one: tuple[str, ShardEntry, Manifest, int]) -> str:
            """At one shard; empty where it is as it was written."""
            path, entry, manifest, number = one
            try:
                if not is_url(path):
                    _check_file(path, entry, manifest.footer(number))
                elif (num_bytes := self._fetcher.size(path)) != entry["bytes"]:
                    raise _DamagedError(f"the file has {num_bytes:,} bytes instead of {entry['bytes']:,}")
            except (_DamagedError, FetchError, OSError) as error:
                return f"{path}: {error.strerror if isinstance(error, OSError) and error.strerror else error}"
            return ""

        with ThreadPoolExecutor(NUM_LOOKING) as pool:
            return [problem for problem in pool.map(look, named[share::num_shares]) if problem]

    @property
    def num_files(self) -> int:
        """Shards of all folders together."""
        return sum(len(manifest.header["shards"]) for manifest in self._manifests)

    def _find(self, row_group: int) -> tuple[int, int]:
        """Number of the folder, and of the row group in it."""
        folder = int(np.searchsorted(self._first_row_group, row_group, side="right")) - 1
        return folder, row_group - int(self._first_row_group[folder])

    def _place(self, row_group: int) -> str:
        """A row group as messages name it: `shards/train-00002.parquet, row group 7`, counted from 0 in its shard."""
        folder, number = self._find(row_group)
        shards = self._manifests[folder].row_groups("shard")
        shard = int(shards[number])
        name = self._manifests[folder].header["shards"][shard]["name"]
        return f"{join(self.folders[folder], name)}, row group {number - int(np.searchsorted(shards, shard))}"

    @staticmethod
    def _joined(parts: list[np.ndarray]) -> np.ndarray:
        """The arrays of all folders in a row; that of a single one stays mapped from its file."""
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _DamagedError(Exception):
    """Stored bytes are not what was written."""


class _Window(io.RawIOBase):
    """The bytes of one row group, at the place in the file that parquet's metadata says."""

    def __init__(self, data: bytes, offset: int) -> None:
        """`data` are the bytes of the file from `offset` on."""
        self._data, self._offset, self._at = data, offset, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._offset + len(self._data)}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at - self._offset
        assert start >= 0, "parquet reads in its row group alone"
        data = self._data[start:] if size < 0 else self._data[start : start + size]
        self._at += len(data)
        return data


def _check_file(path: str, entry: ShardEntry, footer: bytes) -> None:
    """A local shard has the size and, outside of the row groups, the bytes that its manifest says."""
    num_bytes = Path(path).stat().st_size
    if num_bytes != entry["bytes"]:
        raise _DamagedError(f"the file has {num_bytes:,} bytes instead of {entry['bytes']:,}")
    with open(path, "rb") as file:
        rest = file.read(4)
        file.seek(-len(footer), io.SEEK_END)
        if not has_digest(rest + file.read(), bytes.fromhex(entry["rest_digest"])):
            raise _DamagedError("the footer differs from the one that was written (checksum)")


def _open_manifest(folder: str, fetcher: Fetcher) -> Manifest:
    """The manifest of a folder, local or remote. DataError where it has none, and why as far as that shows."""
    origin = join(folder, MANIFEST)
    try:
        path = fetcher.download(origin)
    except (FetchError, OSError) as error:
        if not is_url(folder) and Path(folder).is_file():
            raise DataError(
                f"{folder} is a file of rows, not a folder of shards; name the folder that "
                "`gemma-dist shard … --out FOLDER` makes of it"
            ) from None
        if folder.startswith(HUB):
            raise DataError(
                f"{folder} holds no {MANIFEST}: {error}; rows of the hub are taken by `gemma-dist shard` (and "
                "`gemma-dist init`): name the folder that it makes of them"
            ) from error
        if isinstance(error, StoreRefusalError):
            raise DataError(f"the manifest was not given: {error}") from error
        begun = not is_url(folder) and (Path(folder) / UNFINISHED).exists()
        left = " (a `gemma-dist shard` run was interrupted there; run it again)" * begun
        if not is_url(folder) and (others := _meant(folder)):
            raise DataError(f"{folder} holds no {MANIFEST}; {others}") from None
        raise DataError(
            f"{folder} holds no {MANIFEST}{left}: {error}; make shards with `gemma-dist shard … --out {folder}`"
        ) from error
    return read_manifest(path, origin)


def _meant(folder: str) -> str:
    """What may be meant by the name of a folder that holds no shards: those in it, or several with commas between."""
    parts = [part.strip() for part in folder.split(",") if part.strip()]
    if "," in folder and all((Path(part) / MANIFEST).is_file() for part in parts):
        return f"name several as a list: [{', '.join(parts)}]"
    if inside := sorted(str(path.parent) for path in Path(folder).glob(f"*/{MANIFEST}")):
        return f"these do: {', '.join(inside)}; name those that you mean"
    return ""


def open_shards(*folders: str | Path, weights: WeightsByStep | None = None, fetcher: Fetcher | None = None) -> Shards:
    """Open folders that `gemma-dist shard` finished, local ones or URLs, as one corpus, or as a mixture by `weights`.

    Raises:
        DataError: as `Shards` does.
    """
    return Shards([str(folder) for folder in folders], weights, fetcher or Fetcher(None, 0))


def is_shard_folder(path: str | Path) -> bool:
    """Whether `path` was written, or begun, by `gemma-dist shard`."""
    return is_url(path) or (Path(path) / MANIFEST).exists() or (Path(path) / UNFINISHED).exists()


def refuse_row_settings(folder: str | Path, settings: RowConfig, *, but: Sequence[str] = ()) -> None:
    """Raises ConfigError where rows are to be read in a way that is decided when shards are made, `but` of these."""
    for name, field in type(settings).model_fields.items():
        decided = name in ShardConfig.model_fields and name not in (*EncodingConfig.model_fields, *but)
        if decided and (value := getattr(settings, name)) != field.default:
            raise ConfigError(
                f"{folder}: `{name}: {value}` is for raw rows; the samples of shards are as `gemma-dist shard` "
                "made them, so give it there, and leave it out here"
            )


def load_trajectories(path: Path, settings: RowConfig) -> Iterator[Trajectory]:
    """The trajectories of a shard folder or of raw rows (any input of `run_shard`), in order, for evaluate and inspect.

    Raises:
        DataError: a row breaks the data contract, or a shard is damaged.
    """
    if is_shard_folder(path):
        shards = open_shards(path)
        yield from map(shards.read, range(len(shards)))
    else:
        for where, row in read_with_answers(path, settings.max_row_bytes):
            yield parse(row, where, settings)
