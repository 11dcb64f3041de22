"""Make a model folder, or an adapter, of a checkpoint: without its optimizer, a GPU, or the model in memory.

A checkpoint of this package, or a model folder, has its weights linked: no byte is written twice. From a folder of
DeepSpeed's (`zero.py`) they are streamed: the optimizer's float32 weights of all ranks, rounded once; buffers, and what
is frozen, from the module.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_dist.config_merge import ExportConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.export.weights import (
    Result,
    bytes_to_write,
    from_adapter,
    from_base,
    from_model,
    from_zero,
    num_bytes_of,
    require_complete,
    with_lm_head,
    write_result,
)
from gemma_dist.export.zero import ZeroFolder, find_zero_folder, open_zero_folder
from gemma_dist.files import require_free, whole_folder
from gemma_dist.logs import write_json
from gemma_dist.merge.folders import check_room, choose_side_files, nearest_parent, open_base
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.folder import ADAPTER_CONFIG, local_folder, read_json_object, refuse_custom_code
from gemma_dist.model.record import ADAPTER_RECORD, read_record
from gemma_dist.train.checkpoint import MARKER, damage_of

CONFIG = "config.json"


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    out: Path
    kind: str  # of what was exported, in words
    num_linked: int  # files
    num_tensors: int
    num_from_base: int
    num_bytes: int
    seconds: float
    side_files: dict[str, Path]

    def summary(self) -> str:
        """A few lines for the terminal."""
        more = [f"{self.num_linked} files linked"] if self.num_linked else []
        more += [f"{self.num_from_base} tensors added from the base"] if self.num_from_base else []
        lines = [
            f"{self.out}: {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB, in {self.seconds:.1f} s",
            f"  from {'; '.join([self.kind, *more])}",
        ]
        folders = {path.parent for path in self.side_files.values()}
        for folder in sorted(folders):
            names = ", ".join(name for name, path in self.side_files.items() if path.parent == folder)
            lines.append(f"  from {folder}: {names}")
        return "\n".join(lines)


def export(
    checkpoint: Path, out: Path, settings: ExportConfig, *, base: Path | str | None = None, lm_head: bool = False
) -> ExportReport:
    """Write the model, or adapter, of `checkpoint` to the folder `out`, complete or not at all.

    Args:
        checkpoint: `checkpoint-N` of a run of this package; a model folder; or one that DeepSpeed's engine wrote, or
            which has such a one in it.
        base: a model folder, or a name on the hub: what the checkpoint lacks of it is taken from there, byte for byte.
        lm_head: have lm_head.weight in the result where it is tied to the token embedding, too.

    Raises:
        ConfigError: `out` is taken, lies in the checkpoint, or is being written; or there is no room for it.
        CheckpointError: the checkpoint is damaged or incomplete, holds an adapter where a model is needed, or is of a
            kind that is not read.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    zero_folder = find_zero_folder(checkpoint)
    zero = open_zero_folder(zero_folder) if zero_folder else None
    if zero is not None and zero.is_adapter:
        if base is not None or lm_head:
            raise CheckpointError(
                f"{checkpoint} holds an adapter: export it without --base and --with-lm-head, and add the result to "
                f"its base: `gemma-dist merge --base {base or 'BASE'} --adapter {out} --out FOLDER`"
            )
        result, places = from_adapter(zero, settings), [checkpoint, zero.folder.parent]
    else:
        result, places = _model(checkpoint, zero, settings, base, lm_head)
    side_files = _side_files(places, ADAPTER_CONFIG if result.is_adapter else CONFIG)
    for folder in {path.parent for path in side_files.values()}:
        refuse_custom_code(folder)
    if not result.is_adapter:
        require_complete(result, side_files[CONFIG], checkpoint)
    num_bytes = num_bytes_of(result)
    check_place(out, [checkpoint, *([local_folder(base, f"--base {base}")] if base is not None else [])])
    check_room(out, bytes_to_write(result, nearest_parent(out)))

    with whole_folder(out, num_bytes) as folder:
        write_result(result, folder, settings.max_shard_size)
        for name, path in side_files.items():
            shutil.copyfile(path, folder / name)
        if result.config is not None:
            write_json(folder / CONFIG, result.config)
        if not result.is_adapter:
            _write_record(folder, checkpoint, zero, base)
    return ExportReport(
        out=out,
        kind=_kind(checkpoint, zero),
        num_linked=len(result.linked),
        num_tensors=len(result.headers),
        num_from_base=result.num_from_base,
        num_bytes=num_bytes,
        seconds=time.monotonic() - started,
        side_files=side_files,
    )


def _model(
    checkpoint: Path, zero: ZeroFolder | None, settings: ExportConfig, base: Path | str | None, lm_head: bool
) -> tuple[Result, list[Path]]:
    """The weights of a model, and the folders whose config and tokenizer it gets, the first that has one."""
    base_model = open_base(base) if base is not None else None
    places = [checkpoint, *([zero.folder.parent] if zero else []), *([base_model.folder] if base_model else [])]
    if zero is None:
        _require_whole_model(checkpoint)
        result = from_model(open_base(checkpoint, "CHECKPOINT"), settings)
    else:
        result = from_zero(zero, _config(places), settings)
    if base_model is not None:
        result = from_base(result, base_model)
    if lm_head:
        result = with_lm_head(result)
    return result, places


def _require_whole_model(checkpoint: Path) -> None:
    """Raises CheckpointError where a checkpoint of this package is damaged, or holds an adapter."""
    if (checkpoint / MARKER).is_file() and (problems := damage_of(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} is damaged: {'; '.join(problems)}. Restore it from a copy, or give another one"
        )
    if (checkpoint / ADAPTER_CONFIG).is_file() and not (checkpoint / CONFIG).is_file():
        record = read_record(checkpoint) or {}
        base = record.get("base_model") or read_adapter_config(checkpoint).get("base_model_name_or_path", "BASE")
        raise CheckpointError(
            f"{checkpoint} holds an adapter, not a model; add it to its base: `gemma-dist merge --base {base} "
            f"--adapter {checkpoint} --out FOLDER`. For a server's LoRA, use --adapter {checkpoint} --for vllm"
        )
    if not (checkpoint / CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: it has neither {CONFIG} nor {ADAPTER_CONFIG} nor DeepSpeed's "
            "*_model_states.pt; name a folder checkpoint-<step>"
        )


def _config(places: Iterable[Path]) -> dict[str, Any]:
    """The config.json of the first folder that has one."""
    for folder in places:
        if (folder / CONFIG).is_file():
            return read_json_object(folder / CONFIG, "the config of the model is broken")
    raise CheckpointError(f"no {CONFIG} lies beside the checkpoint; give the model that was trained as --base")


def _side_files(places: Sequence[Path], settings_file: str) -> dict[str, Path]:
    """Config, tokenizer, processor and template of the result, by name, from the first folder that has each."""
    settings = [folder / settings_file for folder in places if (folder / settings_file).is_file()]
    if not settings:
        raise CheckpointError(
            f"no {settings_file} lies beside the checkpoint, which holds an adapter; put the run's own one there"
        )
    return {settings_file: settings[0], **choose_side_files(places)}


def check_place(out: Path, read: Iterable[Path]) -> None:
    """Refuse a place that would overwrite something, or that lies in a folder that is read.

    Raises:
        ConfigError: `out`, an absolute path, is such a place.
    """
    for folder in read:
        if out.is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {out} lies in {folder}, which is read; name a folder outside it")
    require_free(out)


def _write_record(folder: Path, checkpoint: Path, zero: ZeroFolder | None, base: Path | str | None) -> None:
    """gemma_dist.json: that of the checkpoint, if it has one, and where the result is from."""
    record: dict[str, Any] = dict(read_record(checkpoint) or {})
    record |= {"exported_from": str(checkpoint)}
    if base is not None:
        record |= {"completed_from": str(base)}
    if zero is not None:
        record |= {"zero_stage": zero.stage, "num_ranks": zero.num_ranks, "step": zero.step}
    write_json(folder / ADAPTER_RECORD, record)


def _kind(checkpoint: Path, zero: ZeroFolder | None) -> str:
    """What was exported, in words."""
    if zero is None:
        return f"{checkpoint}"
    stage = f"ZeRO-{zero.stage}" if zero.stage else "no ZeRO"
    return f"{zero.folder} (DeepSpeed, {stage}, {zero.num_ranks} ranks, step {zero.step})"
