"""Rows that are there twice, or nearly, in one corpus or in two: arithmetic on fingerprints, no row is read.

Rows are nearly the same where their signatures agree in at least 80 % of 128 places. How often that finds a pair whose
shingles agree in a share J (Jaccard), and how often it takes one that it should not:

    J        0.60     0.70    0.75    0.80    0.85    0.90     0.95
    found    0.0000   0.003   0.07    0.47    0.93    0.9995   1.0000

One word changed in 100 leaves J = 0.90. Candidates are rows that agree in all of one of 16 bands of 8 places, so the
time grows with the rows, not with their pairs. Of candidates that are not alike, each is compared with the first
MAX_COMPARED only: in a corpus of rows from one template some pairs may be missed, none is made up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_dist.show.fingerprints import NUM_PERMUTATIONS, Fingerprints, RowName

MIN_SIMILARITY = 0.8
BAND = 8  # places of a signature
MAX_COMPARED = 100
NUM_EXAMPLES = 5
NUM_ROWS_SHOWN = 3  # of a group
_BAND_FACTORS = np.random.default_rng(1).integers(0, 2**63, BAND, np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Example:
    """The first rows of a group, or a row and the one of the other corpus that it equals."""

    rows: list[RowName]
    similarity: float | None = None  # of the first two, where they are not the same: estimated


@dataclass(frozen=True)
class Duplicates:
    """Rows that belong together, in groups of two or more."""

    num_rows: int = 0  # in all groups together
    num_groups: int = 0
    examples: list[Example] = field(default_factory=list)  # the first groups


@dataclass(frozen=True)
class Leaks:
    """Rows that the other corpus has, too."""

    num_rows: int
    examples: list[Example]


def rows_by_key(keys: np.ndarray) -> Iterator[np.ndarray]:
    """For each key (N,) that several rows have: these rows, in order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, int)
    ends = np.append(starts[1:], len(keys))
    has_several = ends - starts > 1
    for start, end in zip(starts[has_several].tolist(), ends[has_several].tolist(), strict=True):
        yield order[start:end]


def find_exact(rows: Fingerprints) -> Duplicates:
    """Rows with the same messages, tools and images."""
    return _in_order(list(rows_by_key(rows.exact)), rows)


def find_same_prompt(rows: Fingerprints) -> Duplicates:
    """Rows that ask the same and go on differently. Of exact duplicates the first one counts."""
    distinct = _first_of_each(rows.exact)
    groups = [distinct[group] for group in rows_by_key(rows.prompt[distinct])]
    return _in_order(groups, rows)


def find_near(rows: Fingerprints) -> Duplicates:
    """Rows that are nearly the same. Of exact duplicates the first one counts."""
    distinct = _first_of_each(rows.exact)
    signatures = rows.signatures[distinct]
    group_of = np.arange(len(distinct))  # of each row: an earlier row of its group, or itself
    for candidates in _candidates(signatures):
        _join_similar(candidates, signatures, group_of)
    roots = np.array([_root(group_of, row) for row in range(len(distinct))], int)
    groups = [distinct[group] for group in rows_by_key(roots)]
    return _in_order(groups, rows, rows.signatures)


def group_alike(rows: Fingerprints, labels: Sequence[str]) -> np.ndarray:
    """(N,): of each row the first row of its group: rows that are the same or nearly so, that ask the same, or that
    have the same label, if any; and what is alike to one of these."""
    group_of = np.arange(len(rows))
    numbers: dict[str, int] = {}
    label_of = np.array([numbers.setdefault(label, row) if label else row for row, label in enumerate(labels)], int)
    for keys in (rows.prompt, label_of):
        for group in rows_by_key(keys):
            for row in group[1:].tolist():
                one, other = sorted([_root(group_of, int(group[0])), _root(group_of, row)])
                group_of[other] = one
    for candidates in _candidates(rows.signatures):
        _join_similar(candidates, rows.signatures, group_of)
    return np.array([_root(group_of, row) for row in range(len(rows))], int)


def _join_similar(candidates: np.ndarray, signatures: np.ndarray, group_of: np.ndarray) -> None:
    """Join each of the candidates with the first one that it is similar to."""
    for _ in range(MAX_COMPARED):
        first, others = candidates[0], candidates[1:]
        is_similar = _similarity(signatures[others], signatures[first]) >= MIN_SIMILARITY
        for row in others[is_similar].tolist():
            one, other = sorted([_root(group_of, int(first)), _root(group_of, row)])
            group_of[other] = one
        candidates = others[~is_similar]
        if len(candidates) < 2:
            return


def _root(group_of: np.ndarray, row: int) -> int:
    """The first row of the group of `row`; the way there is made shorter for the next time."""
    while group_of[row] != row:
        group_of[row] = group_of[group_of[row]]
        row = int(group_of[row])
    return row


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """The first row with each key, in order."""
    _, first = np.unique(keys, return_index=True)
    return np.sort(first)


def _in_order(groups: list[np.ndarray], rows: Fingerprints, signatures: np.ndarray | None = None) -> Duplicates:
    """The groups counted, with examples of those that begin first."""
    groups.sort(key=lambda group: int(group[0]))
    examples = []
    for group in groups[:NUM_EXAMPLES]:
        names = [rows.name(row) for row in group[:NUM_ROWS_SHOWN].tolist()]
        similarity = None
        if signatures is not None:
            similarity = float(_similarity(signatures[group[1]], signatures[group[0]]))
        examples.append(Example(names, similarity))
    return Duplicates(sum(map(len, groups)), len(groups), examples)


def _similarity(signatures: np.ndarray, one: np.ndarray) -> np.ndarray:
    """(…): the share of places in which signatures (…, NUM_PERMUTATIONS) agree with one."""
    return (signatures == one).mean(axis=-1)


def _candidates(signatures: np.ndarray) -> Iterator[np.ndarray]:
    """Rows whose signatures agree in a band, band by band."""
    for start in range(0, NUM_PERMUTATIONS, BAND):
        band = signatures[:, start : start + BAND].astype(np.uint64)
        yield from rows_by_key((band * _BAND_FACTORS).sum(axis=1, dtype=np.uint64))


# ---- two corpora -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Which rows of a corpus another one has, too. A row counts once, where it is most alike."""

    data: list[str]  # files and folders of the other one
    num_rows: int  # of the other one
    num_refused: int
    exact: Leaks
    near: Leaks
    same_prompt: Leaks


def find_overlap(rows: Fingerprints, other: Fingerprints, data: list[str], num_refused: int) -> Overlap:
    """The rows that also stand in `other`: exactly, nearly, or with another answer to the same prompt.

    Args:
        data: files and folders that `other` was read from.
        num_refused: how many of their rows are not in it.
    """
    exact = _matches(rows.exact, other.exact)
    left = np.flatnonzero(exact < 0)
    near, similarity = np.full(len(rows), -1), np.zeros(len(rows))
    near[left], similarity[left] = _near_matches(rows.signatures[left], other.signatures)
    prompt = _matches(rows.prompt, other.prompt)
    prompt[(exact >= 0) | (near >= 0)] = -1
    return Overlap(
        data,
        len(other),
        num_refused,
        exact=_leaks(exact, rows, other),
        near=_leaks(near, rows, other, similarity),
        same_prompt=_leaks(prompt, rows, other),
    )


def _matches(keys: np.ndarray, other_keys: np.ndarray) -> np.ndarray:
    """(N,): the first row of the other corpus with the same key, or -1."""
    unique, first = np.unique(other_keys, return_index=True)
    if not len(unique):
        return np.full(len(keys), -1)
    at = np.minimum(np.searchsorted(unique, keys), len(unique) - 1)
    return np.where(unique[at] == keys, first[at], -1)


def _near_matches(signatures: np.ndarray, other_signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,): the most similar row found in the other corpus, or -1; and (N,) how similar it is."""
    num_rows = len(signatures)
    match, similarity = np.full(num_rows, -1), np.zeros(num_rows)
    for candidates in _candidates(np.concatenate([signatures, other_signatures])):
        mine = candidates[candidates < num_rows]
        if not len(mine):
            continue
        for row in (candidates[candidates >= num_rows] - num_rows)[:MAX_COMPARED].tolist():
            found = _similarity(signatures[mine], other_signatures[row])
            is_better = (found >= MIN_SIMILARITY) & (found > similarity[mine])
            match[mine[is_better]] = row
            similarity[mine[is_better]] = found[is_better]
    return match, similarity


def _leaks(match: np.ndarray, rows: Fingerprints, other: Fingerprints, similarity: np.ndarray | None = None) -> Leaks:
    """The rows with a match, and the first of them as examples."""
    found = np.flatnonzero(match >= 0).tolist()
    examples = []
    for row in found[:NUM_EXAMPLES]:
        names = [rows.name(row), other.name(int(match[row]))]
        examples.append(Example(names, None if similarity is None else float(similarity[row])))
    return Leaks(len(found), examples)
