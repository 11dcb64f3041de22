"""What is written is whole and on the disk before it has its name, and readable for whom the umask says."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemma_dist import ranklog
from gemma_dist.errors import ConfigError
from gemma_dist.files import UMASK, exclusive, link_or_copy, made, make_own, put, seal, whole_folder, writing
from gemma_dist.logs import JsonlWriter
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.folder import Part, at_work


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced and renamed, in order, by names."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(handle: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        seen.append(f"name {target.name}")
        return replace(self, target)

    def renamed(self: Path, target: Path) -> Path:
        seen.append(f"name {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    with writing(tmp_path / "report.json") as temporary:
        temporary.write_text("whole")
    assert events == [f"sync .report.json.{os.getpid()}.tmp", "name report.json", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_is_not_finished_leaves_the_old_one_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")

    def write_half() -> None:
        with writing(tmp_path / "report.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "report.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    with whole_folder(tmp_path / "out", 1) as folder:
        (folder / "weights").write_text("whole")
    assert events == ["sync weights", f"sync {folder.name}", "name out", f"sync {tmp_path.name}"]


def test_files_of_libraries_get_the_modes_of_the_umask(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    seal(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~UMASK
    assert os.umask(UMASK) == UMASK  # to read it has not changed it


def test_a_linked_file_keeps_its_mode(tmp_path: Path) -> None:
    """It may be another user's, or protected from being written."""
    (tmp_path / "old").write_text("weights")
    (tmp_path / "old").chmod(0o444)
    with whole_folder(tmp_path / "out", 0) as folder:
        link_or_copy(tmp_path / "old", folder / "linked")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o444


def test_a_link_that_a_kill_left_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a checkpoint's file: a copy into it would overwrite that checkpoint."""
    old, new, left = tmp_path / "old", tmp_path / "new", tmp_path / ".out.1.tmp"
    old.write_text("of the old checkpoint")
    new.write_text("of the new one")
    for links in (True, False):
        left.unlink(missing_ok=True)
        os.link(old, left)
        if not links:
            monkeypatch.setattr(os, "link", refuse)
        link_or_copy(new, left)
        assert (old.read_text(), left.read_text()) == ("of the old checkpoint", "of the new one")
        assert (left.stat().st_nlink == 2) == links


def refuse(*_: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def test_of_a_symbolic_link_the_file_itself_is_linked(tmp_path: Path) -> None:
    """The hub's cache has relative ones, which would lead nowhere from another folder."""
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot" / "weights").symlink_to("../blob")
    link_or_copy(tmp_path / "snapshot" / "weights", tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").samefile(tmp_path / "blob")


# ---- links that somebody planted -------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder that planted links lead to, with a file: nothing in it changes."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    (folder / uuid.uuid4().hex).mkdir()
    before = sorted(folder.iterdir())
    yield folder
    assert (folder / "file").read_text() == "precious"
    assert sorted(folder.iterdir()) == before


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "report.json"
    for name in (f".report.json.{os.getpid()}.tmp", "lines.jsonl"):
        (tmp_path / name).symlink_to(victim / "file")
    with writing(out) as temporary:
        temporary.write_text("whole")
    assert out.read_text() == "whole"
    (tmp_path / f".report.json.{os.getpid()}.tmp").symlink_to(victim / "file")
    put(out, b"again")
    assert out.read_text() == "again"
    assert not out.is_symlink()
    JsonlWriter(tmp_path / "lines.jsonl", append=False).close()
    assert not (tmp_path / "lines.jsonl").is_symlink()


def test_a_log_is_not_added_to_through_a_link(tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(victim / "file")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        JsonlWriter(tmp_path / "metrics.jsonl", append=True)
    ranklog.keep()
    (tmp_path / "logs").mkdir()
    ranklog.write_to(tmp_path, {})
    ranklog.close()
    (log,) = (tmp_path / "logs").iterdir()
    log.unlink()
    log.symlink_to(victim / "file")
    ranklog.keep()
    ranklog.write_to(tmp_path, {})
    ranklog.close()
    assert f"the log {log} cannot be written: Too many levels of symbolic links" in capsys.readouterr().err


def test_a_folder_is_not_filled_in_anothers(tmp_path: Path, victim: Path) -> None:
    (tmp_path / ".out.tmp").symlink_to(victim)
    with pytest.raises(PermissionError, match="is no folder, or a link to one"), whole_folder(tmp_path / "out", 1):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives folders away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        make_own(tmp_path / "theirs")


def test_a_cache_is_ours_alone(tmp_path: Path, victim: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "gemma_dist-row-groups").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"data.cache_dir = .*is no folder, or a link to one"):
        Fetcher(shared, 1)
    (shared / "gemma_dist-row-groups").unlink()
    (shared / "gemma_dist-row-groups").mkdir(0o777)
    (shared / "gemma_dist-row-groups").chmod(0o777)
    Fetcher(shared, 1)
    lock = shared / "gemma_dist-row-groups" / "size.lock"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (lock.parent, lock)] == [0o700, 0o600]
    lock.unlink()
    lock.symlink_to(victim / "file")
    with pytest.raises(ConfigError, match=r"data.cache_dir = .*symbolic links"):
        Fetcher(shared, 1)


def test_a_lock_is_not_opened_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".part-1-of-2").symlink_to(victim / "file")
    with pytest.raises(OSError, match="symbolic links"), at_work(tmp_path / "shards", Part(1, 2)):
        pass


def test_an_output_folder_may_be_a_link_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with exclusive(tmp_path / "out", "taken"):
        pass


def test_folders_that_were_begun_for_nothing_are_gone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    folder = tmp_path / "old" / "a" / "b"
    with pytest.raises(ConfigError, match="no"), made(folder):
        raise ConfigError("no")
    assert not folder.parent.exists()
    with contextlib.suppress(ConfigError), made(folder):
        (folder.parent / "file").touch()
        raise ConfigError("no")
    assert folder.parent.exists()
    assert not folder.exists()
    (folder.parent / "file").unlink()
    folder.parent.rmdir()
    with pytest.raises(ConfigError, match="no"), whole_folder(tmp_path / "new" / "deep" / "out", 1):
        raise ConfigError("no")
    with pytest.raises(ConfigError, match="no"), exclusive(tmp_path / "new" / "deep", "taken"):
        raise ConfigError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
