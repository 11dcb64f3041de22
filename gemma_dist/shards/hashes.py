"""64-bit hashes of ids, by which repeated ones are found in little memory.

The ids of a piece, hashed and sorted, make a file beside its record. `equal_hashes` goes through the range of all
hashes in steps and reads of each file what falls into the step: memory does not grow with the number of ids. Equal ids
have equal hashes, and the others do not matter: who finds two equal hashes looks at the ids.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema({"hash": pa.uint64(), "sample": pa.int32()})  # ascending; equal ones in the order of the samples
HASHES_AT_ONCE = 1 << 21  # that are looked at together: some 100 MB
IDS_AT_ONCE = 1 << 16  # that are hashed together: some 50 bytes for each byte of theirs
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses a bit


class Place(NamedTuple):
    """One of the ids: number of its file, and of the sample there."""

    file: int
    sample: int


def hash_ids(ids: pa.Array) -> np.ndarray:
    """(N,) uint64 of N large strings: a polynomial over their bytes modulo 2^64, its bits mixed as SplitMix64 does
    (Steele, Lea and Flood, 2014, https://doi.org/10.1145/2660193.2660195, figure 17)."""
    offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    ends = offsets - offsets[0]
    lengths = np.diff(ends)
    powers = np.cumprod(np.full(lengths.max(initial=0), _BASE), dtype=np.uint64)
    terms = (data + np.uint64(1)) * powers[np.arange(len(data)) - np.repeat(ends[:-1], lengths)]
    sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])
    hashes = sums[ends[1:]] - sums[ends[:-1]]
    hashes = (hashes ^ hashes >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ hashes >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return hashes ^ hashes >> np.uint64(31)


def write_hashes(path: Path, ids: pa.Array) -> None:
    """Write the sorted hashes of N large strings to `path`, for `equal_hashes`. A killed call leaves a part of it."""
    parts = [hash_ids(ids.slice(start, IDS_AT_ONCE)) for start in range(0, len(ids), IDS_AT_ONCE)]
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    order = np.argsort(hashes, kind="stable")
    with pa.ipc.new_file(path, SCHEMA) as file:
        file.write_batch(pa.record_batch([hashes[order], order.astype(np.int32)], schema=SCHEMA))


def equal_hashes(files: Sequence[Path], num_ids: int) -> Iterator[list[Place]]:
    """The places of each hash that occurs more than once, in the order of files and samples.

    Args:
        num_ids: of all files together.
    """
    num_steps = max(1, -(-num_ids // HASHES_AT_ONCE))
    for low, high in pairwise(2**64 * step // num_steps for step in range(num_steps + 1)):
        parts = [_between(file, low, high) for file in files]
        hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in parts)])
        in_order = np.sort(hashes)
        repeated = in_order[1:][in_order[1:] == in_order[:-1]]
        if not len(repeated):
            continue
        first_of_file = np.cumsum([0, *(len(hashes) for hashes, _ in parts)])
        samples = np.concatenate([samples for _, samples in parts])
        found = np.flatnonzero(np.isin(hashes, repeated))
        found = found[np.argsort(hashes[found], kind="stable")]
        numbers = np.searchsorted(first_of_file, found, side="right") - 1
        places = [Place(*pair) for pair in zip(numbers.tolist(), samples[found].tolist(), strict=True)]
        starts = np.flatnonzero(np.diff(hashes[found])) + 1
        yield from (places[start:end] for start, end in pairwise([0, *starts.tolist(), len(places)]))


def _between(path: Path, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of a file in [low, high), and their samples. It is mapped for that long: pages that were looked at
    count as memory of the process."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    hashes, samples = (batch.column(name).to_numpy() for name in SCHEMA.names)
    start = np.searchsorted(hashes, np.uint64(low))
    end = len(hashes) if high == 2**64 else np.searchsorted(hashes, np.uint64(high))
    return hashes[start:end].copy(), samples[start:end].copy()
