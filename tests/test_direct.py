"""Files that several threads write: the same bytes past the page cache and through it, and nothing at work after."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_dist.errors import CheckpointError
from gemma_dist.merge import arithmetic, direct
from gemma_dist.merge.plan import Lora
from gemma_dist.merge.stream import Computed, Copied, Rows, Workers, row_blocks, write_weights
from gemma_dist.tensorfile import Entry, open_tensors

SHAPES = {
    "whole pages": (512, 64),
    "whole pages in several blocks": (640, 2048),
    "pages of which a block takes a part": (512, 24),
    "a row of no whole page": (65, 10),
    "one value": (),
    "a stack": (4, 128, 96),
    "a stack of whole pages, a matrix of which has a part of one": (64, 1, 32),
}


def giving(values: torch.Tensor) -> Callable[[Workers], Rows]:
    """Rows of `values`, each block of which lies at an odd place in memory."""

    def rows(start: int, stop: int) -> torch.Tensor:
        found = values.reshape(-1, values.shape[-1] if values.dim() else 1)[start:stop]
        return torch.cat([found.new_zeros(1), found.flatten()])[1:].view_as(found)

    return lambda workers: rows


def write(path: Path, tensors: dict[str, torch.Tensor], copied: Path) -> None:
    entries = {name: Entry("BF16", tuple(value.shape), 0, value.nbytes) for name, value in tensors.items()}
    source = open_tensors(copied)
    planned = {
        name: Copied(source, name) if name in source.entries else Computed(entry, giving(tensors[name]))
        for name, entry in entries.items()
    }
    with Workers() as workers:
        assert set(write_weights(path, planned, {"format": "pt"}, workers)) == set(tensors)


def test_direct_writes_give_the_bytes_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    tensors = {"copied first": torch.randn(64, 128).bfloat16(), **tensors, "copied": torch.randn(7).bfloat16()}
    save_file({name: value for name, value in tensors.items() if "copied" in name}, tmp_path / "base.safetensors")
    for name, kinds in (("direct", direct.ON_LOCAL_DISK), ("cached", set())):
        monkeypatch.setattr(direct, "ON_LOCAL_DISK", kinds)
        write(tmp_path / name, tensors, tmp_path / "base.safetensors")
    assert (tmp_path / "direct").read_bytes() == (tmp_path / "cached").read_bytes()
    written = load_file(tmp_path / "direct")
    assert all(torch.equal(written[name], value) for name, value in tensors.items())
    entries = open_tensors(tmp_path / "direct").entries
    for name in ("whole pages", "whole pages in several blocks", "a stack"):
        assert entries[name].begin % direct.PAGE_BYTES == 0
    assert len(list(row_blocks(SHAPES["whole pages in several blocks"]))) > 1


def test_after_an_error_no_thread_writes_to_the_closed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    settled: list[bool] = []
    close = direct.SharedFile.__exit__

    def note_and_close(file: direct.SharedFile, *error: object) -> None:
        settled.append(ended.is_set())
        close(file, *error)

    monkeypatch.setattr(direct.SharedFile, "__exit__", note_and_close)

    def rows(start: int, stop: int) -> torch.Tensor:
        if start == 0:
            begun.wait(30)
            return torch.full((stop - start, 2048), torch.nan).bfloat16()
        begun.set()
        time.sleep(0.5)  # by then the error has ended the file, if it does not wait
        ended.set()
        return torch.zeros(stop - start, 2048).bfloat16()

    shape = (512, 2048)
    tensor = Computed(Entry("BF16", shape, 0, 512 * 2048 * 2), lambda workers: rows)
    with pytest.raises(CheckpointError, match="NaN or infinity"), Workers() as workers:
        for _ in write_weights(tmp_path / "file", {"w": tensor}, {}, workers):
            pass
    assert settled == [True]


@pytest.mark.parametrize("scale", [1.0, 2.0, 16.0, 0.5, 3.0])
def test_a_scale_in_the_factor_changes_no_bit(scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(128, 96).bfloat16(), torch.randn(16, 96), torch.randn(128, 16)
    save_file({"w": weight}, tmp_path / "base.safetensors")
    save_file({"a": a, "b": b}, tmp_path / "adapter.safetensors")
    lora = Lora(a="a", b="b", scale=scale, magnitude=None)
    with Workers() as workers:
        stored = lambda start, stop: weight[start:stop].float()  # noqa: E731
        rows = arithmetic.lora_rows(workers, stored, lora, open_tensors(tmp_path / "adapter.safetensors"), (128, 96))
        assert torch.equal(rows(0, 128), weight.float() + (b @ a) * scale)
