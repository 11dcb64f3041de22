"""Shards that are written to a store: made in a folder on a disk, then sent under their names, the manifest last.

    WORK/a1b2…/shards/      the folder, as `gemma-dist shard` writes it on a disk
    WORK/a1b2…/store.json   which store it is for, and the end of the manifest that was there when it was begun
    WORK/a1b2…/sent.jsonl   what was sent: a call that was killed goes on behind it

WORK is `--work-dir`, or a folder of ours in the user's folder of caches; of a URL it has one folder, which is removed
once the store has everything. Two calls that write to one URL from two folders at once are told of one another where
the manifest of the first is there before the second sends its own: a store has no lock.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from gemma_dist.errors import DataError
from gemma_dist.logs import JsonlWriter, log, progress, read_jsonl, write_json
from gemma_dist.shards.fetch import Fetcher, FetchError, FileSystem, join
from gemma_dist.shards.folder import APPEND_REJECTED, SHARD, Plan, finished_already, one_at_a_time
from gemma_dist.shards.manifest import END, FINISHED, MANIFEST, UNFINISHED, read_manifest
from gemma_dist.shards.report import REJECTED, TOO_LONG
from gemma_dist.shards.tools import TOOLS
from gemma_dist.visible import masked

BESIDE = (REJECTED, TOO_LONG, TOOLS, FINISHED)  # the shards, and sent behind them
PROBE = ".writable"  # put into the store and removed, to see whether that goes
TAIL_BYTES = hashlib.sha256().digest_size + len(END)  # tells manifests apart: the SHA-256 is in it
T = TypeVar("T")


class Store:
    """A folder of a store, and the one on a disk in which its shards are made."""

    def __init__(self, url: str, work_dir: Path | None) -> None:
        """Raises DataError where the store cannot be written."""
        self.url = url
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        work_dir = work_dir or caches / "gemma_dist" / "shards"
        self._root = work_dir / hashlib.sha256(masked(url).encode()).hexdigest()[:16]
        self.folder = self._root / "shards"
        self._note, self._sent = self._root / "store.json", self._root / "sent.jsonl"
        self._fetcher = Fetcher(None, 0)
        try:
            self._ask(PROBE, lambda system, path: system.pipe_file(path, b"gemma_dist"))
        except FileNotFoundError as error:  # stores with real folders
            raise DataError(f"{url} cannot be written: {error}; make the folder first") from error
        self._remove(PROBE)

    def _ask(self, name: str, attempt: Callable[[FileSystem, str], T]) -> T:
        """What the file system says of a file of the folder. FileNotFoundError, or DataError where it says no."""
        path = join(self.url, name) if name else self.url
        try:
            return self._fetcher.patiently(path, lambda: attempt(self._fetcher.system(path), path))
        except FileNotFoundError:
            raise
        except (FetchError, OSError, NotImplementedError) as error:
            raise DataError(f"{self.url} cannot be written: {error}; then run the same command again") from error

    def _remove(self, name: str) -> None:
        """Remove a file of ours, if that goes: who may write may not remove, or another call did."""
        with suppress(DataError, FileNotFoundError):
            self._ask(name, lambda system, path: system.rm_file(path))

    def _tail(self) -> str | None:
        """The end of the store's manifest, hexadecimal; None where there is none."""
        try:
            return self._ask(MANIFEST, lambda system, path: system.cat_file(path, start=-TAIL_BYTES)).hex()
        except FileNotFoundError:
            return None

    def _own_tail(self) -> str | None:
        """The same of the folder's."""
        path = self.folder / MANIFEST
        return path.read_bytes()[-TAIL_BYTES:].hex() if path.exists() else None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that the store has, by name."""
        try:
            found = self._ask("", lambda system, path: system.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found}

    # ---- before the work ---------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, *, alone: bool) -> None:
        """Have in the folder what the store has, but for its shards, or what an earlier call of this plan made.

        Args:
            alone: no other call works in the folder: what was made for another plan or corpus may be removed.

        Raises:
            DataError: there is such a thing and the call is not `alone`; or the store has shards that nobody names.
        """
        with one_at_a_time(self.folder):
            sizes = self.sizes()
            if self._note.exists():
                if self._is_ours(plan, sizes):
                    return
                if not alone:
                    raise DataError(
                        f"{self.url} has changed, or the command, since {self._root} was begun; wait until no part is "
                        "at work and remove that folder"
                    )
                log.warning("%s holds what another command or corpus wanted: it is removed", self.folder)
                for path in self.folder.iterdir():
                    path.unlink()
            log.info("%s: the shards are made in %s and sent from there", self.url, self.folder)
            for name in (*BESIDE, MANIFEST):
                if name in sizes:
                    self._get(name)
            self._refuse_strange(sizes)
            write_json(self._note, {"url": masked(self.url), "tail": self._own_tail()})

    def _is_ours(self, plan: Plan, sizes: Mapping[str, int]) -> bool:
        """Whether the folder has nothing that another plan finished, and the store what it had when it was begun."""
        begun, own, now = self._begun_with(), self._own_tail(), self._tail()
        if own == begun:
            return now == begun
        return now in (begun, own) and finished_already(self.folder, plan, sizes) is not None

    def _begun_with(self) -> str | None:
        """The end of the manifest that the store had when the folder was begun."""
        tail: str | None = json.loads(self._note.read_text(encoding="utf-8"))["tail"]
        return tail

    def _get(self, name: str) -> None:
        """Copy a file of the store into the folder."""
        begun = self._root / name
        self._ask(name, lambda system, path: system.get_file(path, str(begun)))
        begun.replace(self.folder / name)

    def _refuse_strange(self, sizes: Mapping[str, int]) -> None:
        """DataError where the store has shards that neither its manifest names nor we sent: new ones would take their
        place. Nor can be added to shards of which earlier versions listed no tools, which are in the shards."""
        named = set(self._sent_files())
        if (self.folder / MANIFEST).exists():
            header = read_manifest(self.folder / MANIFEST, join(self.url, MANIFEST)).header
            named |= {shard["name"] for shard in header["shards"]}
            if "num_tools" not in header:
                raise DataError(f"{self.url} was made by an earlier version; copy it to a disk to add to it there")
        if strange := {name for name in sizes if SHARD.fullmatch(name)} - named:
            raise DataError(
                f"{self.url} holds {min(strange)!r}, which no manifest there names, and new shards would take its "
                "place; move it away"
            )

    def _sent_files(self) -> dict[str, list[int]]:
        """What was sent, or was about to be: bytes and time of the local file where it was sent whole."""
        lines = read_jsonl(self._sent) if self._sent.exists() else iter(())
        return {line["name"]: line["stamp"] for line in lines}

    # ---- behind it ---------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Send what the folder has, the manifest last, and remove the folder.

        Raises:
            DataError: the store does not take it, or another call has changed its manifest meanwhile.
        """
        own = self._own_tail()
        assert own
        if self._tail() != own:
            shards = read_manifest(self.folder / MANIFEST, str(self.folder / MANIFEST)).header["shards"]
            self._send_shards([shard["name"] for shard in shards if (self.folder / shard["name"]).exists()])
            sizes = self.sizes()
            for name in (*BESIDE, APPEND_REJECTED):
                if (self.folder / name).exists():
                    self._put(name)
                elif name in sizes:  # of an earlier call that was refused
                    self._remove(name)
            for shard in shards:
                if sizes.get(shard["name"]) != shard["bytes"]:
                    raise DataError(
                        f"{join(self.url, shard['name'])} has {sizes.get(shard['name'], 0):,} of {shard['bytes']:,} "
                        "bytes; run the same command again"
                    )
            self._require_unchanged()
            self._put(MANIFEST)
        self._remove_folder()

    def _send_shards(self, names: list[str]) -> None:
        """Send those that were not sent yet."""
        self._require_unchanged()
        sent, sizes = self._sent_files(), self.sizes()
        note = JsonlWriter(self._sent, append=True)
        for name in progress(names, total=len(names), desc=f"sending to {self.url}", unit=" files"):
            status = (self.folder / name).stat()
            stamp = [status.st_size, status.st_mtime_ns]
            if sent.get(name) != stamp or sizes.get(name) != status.st_size:
                note.write({"name": name, "stamp": None})
                self._put(name)
                note.write({"name": name, "stamp": stamp})
        note.close()

    def _put(self, name: str) -> None:
        """Send a file of the folder."""
        self._ask(name, lambda system, path: system.put_file(str(self.folder / name), path))

    def _require_unchanged(self) -> None:
        """DataError where another call has changed the store's manifest since this one began."""
        if self._tail() != self._begun_with():
            raise DataError(
                f"{self.url}: another call has written its manifest meanwhile, which stays as it is; look at what is "
                "there, and run the command again to add to it"
            )

    @contextmanager
    def named(self, *, append: bool, alone: bool) -> Iterator[None]:
        """Errors within name the store, not the folder. A list of refused rows is sent, and the folder removed where
        it has nothing else that is new."""
        try:
            yield
        except DataError as error:
            if alone and not (self.folder / UNFINISHED).exists() and self._is_unchanged():
                refused = APPEND_REJECTED if append else REJECTED
                if (self.folder / refused).exists():
                    self._put(refused)
                self._remove_folder()
            raise DataError(str(error).replace(str(self.folder), self.url)) from error

    def _remove_folder(self) -> None:
        self._note.unlink(missing_ok=True)  # first: what a killed call leaves of the others is of no run that goes on
        shutil.rmtree(self._root, ignore_errors=True)

    def _is_unchanged(self) -> bool:
        return not self._note.exists() or self._own_tail() == self._begun_with()
