"""What is written is whole and on the disk before it has its name, and readable for whom the umask says."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemma_dist.files import UMASK, link_or_copy, seal, whole_folder, writing


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
