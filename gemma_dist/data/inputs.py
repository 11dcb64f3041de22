"""What a user names as input: files and folders, patterns of them, and datasets of the hub.

    logs.jsonl, saved/                              as they are
    'logs/*.jsonl', 'logs/**/*.parquet'             what matches, sorted by name, where no shell has seen to it
    hf://datasets/ORG/NAME[@REVISION][/PATH]        fetched into the hub's cache; PATH is a file, a folder or a pattern

The commit that a dataset of the hub stood at is part of the path in the cache, and so of every plan.
"""

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from gemma_dist.data.formats import mds, saved
from gemma_dist.data.places import SNAPSHOT
from gemma_dist.data.strict import reason
from gemma_dist.errors import DataError
from gemma_dist.logs import log

HUB = "hf://"
KINDS = (".jsonl", ".ndjson", ".json", ".gz", ".zst", ".parquet", ".tar")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside them
_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_BARE = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERS = re.compile(r"\d+")


def find_inputs(names: Iterable[str]) -> list[Path]:
    """The files and folders of names, in their order.

    Raises:
        DataError: there is no such file, nothing matches, or the hub has no such dataset, or cannot be asked.
    """
    return [path for name in names for path in _find(name)]


def identity(path: Path) -> tuple[str, int, int]:
    """What an input is known by: its name, bytes and time of change. In the hub's cache that is its commit, whatever
    the cache and the time."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    num_bytes, changed = sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)
    if found := SNAPSHOT.fullmatch(path.absolute().as_posix()):
        _, organization, name, commit, inside = found.groups()
        return f"{HUB}datasets/{organization}/{name}@{commit}{inside or ''}", num_bytes, 0
    return str(path), num_bytes, changed


def _find(name: str) -> list[Path]:
    if name.startswith(HUB):
        return _fetch(name)
    if Path(name).exists():
        return [Path(name)]
    if "://" in name:
        raise DataError(f"{name}: rows are read from disks and from {HUB}datasets/…; fetch the files first")
    if glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(f"{name}: no file matches; check the pattern")
        return list(map(Path, found))
    if "," in name and all(Path(one).exists() for one in name.split(",") if one):
        raise DataError(f"{name}: no such file, but without commas there is; write blanks between inputs")
    hub = f", or for a dataset of the hub write {HUB}datasets/{name}" if _BARE.fullmatch(name) else ""
    raise DataError(f"{name}: no such file; check the path{hub}")


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _fetch(url: str) -> list[Path]:
    """The inputs that a URL of the hub names, in the hub's cache: fetched where they are not there yet."""
    parsed = _URL.fullmatch(url)
    if not parsed:
        raise DataError(f"{url}: names no dataset; write {HUB}datasets/ORG/NAME, or …/NAME@REVISION/FILE")
    repo, revision, path = parsed[1], unquote(parsed[2] or "") or None, (parsed[3] or "").strip("/")
    folder = _download(url, repo, revision, path)
    log.info("%s is at the commit %s", url, folder.name)
    if ".." in Path(path).parts:
        raise DataError(f"{url}: the path leads out of the dataset; name one inside of it")
    found = sorted(folder.glob(path)) if glob.has_magic(path) else [folder / path]
    inputs = [one for target in found if target.exists() for one in _inputs_of(url, target)]
    if not inputs:
        raise DataError(f"{url}: the dataset has no such file at the commit {folder.name}; check the path")
    return inputs


def _download(url: str, repo: str, revision: str | None, path: str) -> Path:
    """The folder of a commit in the hub's cache, with what lies at `path` in it."""
    from huggingface_hub import constants, snapshot_download

    patterns = [path, f"{path}/*"] if path else None
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client's own family of errors has a dozen roots
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{url}: not, or not all of it, in the hub's cache, and HF_HUB_OFFLINE is set, so that nothing is "
                "downloaded; unset it, or give the same command once where there is a network"
            ) from None
        raise DataError(
            f"{url}: cannot be fetched ({reason(error)}); check the name, the revision and the network, and log in "
            "(hf auth login) where the dataset is gated"
        ) from None


def _inputs_of(url: str, target: Path) -> list[Path]:
    """A file; or a folder of MDS or of `datasets`; or the files in a folder, where they are of one kind.

    Raises:
        DataError: there are several kinds, such as those of several splits.
    """
    if target.is_file() or any((target / name).is_file() for name in (mds.INDEX, saved.STATE, "dataset_dict.json")):
        return [target]
    kinds: dict[str, list[Path]] = {}
    for file in _data_files(target):
        kinds.setdefault(_NUMBERS.sub("*", file.relative_to(target).as_posix()), []).append(file)
    if len(kinds) > 1:
        patterns = ", ".join(f"{url.rstrip('/')}/{kind}" for kind in kinds)
        raise DataError(f"{url}: holds several kinds of files; name those that you mean: {patterns}")
    return [file for files in kinds.values() for file in files]


def _data_files(folder: Path) -> Iterator[Path]:
    """The files of a folder of the hub that may hold rows, sorted."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and file.suffix in KINDS and file.name not in NOT_ROWS and not hidden:
            yield file
