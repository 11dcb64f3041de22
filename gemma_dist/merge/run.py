"""Add a LoRA adapter to its base model: from two folders to one that loads anywhere without PEFT.

Plan first (`plan.py` proves that every adapter tensor has its place), then stream: the result has the shards, names,
shapes and dtypes of the base, and what the adapter does not touch is copied byte for byte, including tensors that
transformers itself would drop on saving (K and V of layers that share them). The new folder appears under its name
only when it is whole and, if asked, verified.
"""

import contextlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_dist.files import whole_folder
from gemma_dist.logs import log, progress, write_json
from gemma_dist.merge.arithmetic import merged
from gemma_dist.merge.folders import (
    WEIGHTS_INDEX,
    Adapter,
    BaseModel,
    BaseWeights,
    as_peft_saves,
    check_out,
    check_side_files,
    find_side_files,
    note_other_base,
    note_quantization,
    note_untrained,
    open_adapter,
    open_base,
    read_quantization,
)
from gemma_dist.merge.names import with_names_of_peft
from gemma_dist.merge.plan import TensorOp, plan_merge
from gemma_dist.merge.stream import Copied, Workers, write_weights
from gemma_dist.merge.verify import Samples, describe, read_samples
from gemma_dist.merge.verify import verify as compare
from gemma_dist.model.record import Quantization, write_merge_record
from gemma_dist.model.vision import name_in_model
from gemma_dist.tensorfile import TensorFile


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    base_weights: BaseWeights
    num_tensors: int
    num_adapted: int
    num_quantized: int  # tensors that went to 4 bit and back
    num_replaced: int
    num_bytes: int
    seconds: float
    side_files: dict[str, str]  # file -> "base" or "adapter"
    notes: list[str]
    verification: dict[str, Any] | None

    def summary(self) -> str:
        """A few lines for the terminal."""
        origins = {
            source: [name for name, origin in self.side_files.items() if origin == source]
            for source in ("base", "adapter")
        }
        lines = [
            f"{self.out}: {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB, in {self.seconds:.1f} s",
            f"  adapter added to {self.num_adapted} tensors, {self.num_replaced} replaced, {self.num_quantized} taken "
            f"to 4 bit and back (base weights: {self.base_weights}), the rest copied byte for byte",
        ]
        lines += [f"  from the {source}: {', '.join(files)}" for source, files in origins.items() if files]
        if self.verification:
            lines += describe(self.verification)
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def merge(
    base: Path | str, adapter: Path, out: Path, *, verify: bool | tuple[Path, int], base_weights: BaseWeights
) -> MergeReport:
    """Write base + adapter to the folder `out`, complete or not at all.

    Args:
        base: a model folder, or a name on the hub whose files are in the local cache or can be fetched.
        adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves it.
        verify: compare the logits of the result with those of base + adapter before the folder gets its name: on so
            many trajectories, the first ones, of a JSONL file or a folder of shards; True: on prompts that are made up.
        base_weights: `as_trained` adds to the weights that training saw, which after QLoRA are those of the base taken
            to 4 bit and back (recorded in the adapter's `gemma_dist.json`); `original` to those of the base as it is.

    Raises:
        DataError: those trajectories cannot be read.
        ConfigError: `out` is taken, lies in the base or the adapter, or is being written; or there is no room for it.
        CheckpointError: base and adapter do not fit, are incomplete or of a kind that cannot be merged; or the result
            failed the comparison.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    base_model, trained = open_base(base), open_adapter(Path(adapter))
    check_out(out, base_model, trained)
    trained = _with_names_of_peft(trained, base_model)
    quantization = read_quantization(trained, base_weights)
    ops = _plan(base_model, trained, quantization)
    notes = _notes(base, base_model, trained, base_weights, ops)
    side_files = find_side_files(base_model, trained)
    check_side_files(side_files, base_model, trained)
    samples = read_samples(*verify, base_model.folder, trained.folder) if isinstance(verify, tuple) else None
    if trained.record is None:
        base_weights = "original"

    with whole_folder(out, base_model.num_bytes) as folder:
        _write_weights(base_model, trained.weights, ops, quantization, folder)
        for name, file in side_files.items():
            shutil.copyfile(file.path, folder / name)
        verification = _compare_logits(base_model, trained, folder, quantization, samples) if verify else None
        write_merge_record(
            folder,
            base=base,
            adapter=trained.folder,
            base_weights=base_weights,
            quantization=quantization,
            verification=verification,
        )

    return MergeReport(
        out=out,
        base_weights=base_weights,
        **_counts(ops),
        num_bytes=base_model.num_bytes,
        seconds=time.monotonic() - started,
        side_files={name: file.origin for name, file in side_files.items()},
        notes=notes,
        verification=verification,
    )


def _counts(ops: list[TensorOp]) -> dict[str, int]:
    return {
        "num_tensors": len(ops),
        "num_adapted": sum(op.lora is not None for op in ops),
        "num_quantized": sum(op.quantized for op in ops),
        "num_replaced": sum(op.replaced_by is not None for op in ops),
    }


def _compare_logits(
    base: BaseModel, adapter: Adapter, folder: Path, quantization: Quantization | None, samples: Samples | None
) -> dict[str, Any]:
    with as_peft_saves(adapter) as known:
        return compare(base.folder, [(known, 1.0)], folder, quantization=quantization, samples=samples)


def _with_names_of_peft(adapter: Adapter, base: BaseModel) -> Adapter:
    weights, settings, note = with_names_of_peft(adapter.weights, adapter.settings, names_in_model(base))
    return replace(adapter, weights=weights, settings=settings, renamed=note)


def names_in_model(base: BaseModel) -> dict[str, str]:
    """The base's tensors: name in the model's class -> name in the file."""
    return {name_in_model(name, base.config.get("model_type", "")): name for name in base.headers}


def _plan(base: BaseModel, adapter: Adapter, quantization: Quantization | None) -> list[TensorOp]:
    """What becomes of each tensor of the base; `quantization` as `read_quantization` returns it."""
    headers, in_file = base.headers, names_in_model(base)
    ops = plan_merge(
        {name: headers[stored] for name, stored in in_file.items()},
        adapter.headers,
        adapter.settings,
        tied_embeddings=base.tied_embeddings,
        quantized_modules=quantization["modules"] if quantization else (),
        quantized_parameters=quantization.get("parameters", ()) if quantization else (),
    )
    return [replace(op, name=in_file[op.name]) for op in ops]


def _notes(
    base_name: Path | str, base: BaseModel, adapter: Adapter, base_weights: BaseWeights, ops: list[TensorOp]
) -> list[str]:
    """What is no error and yet worth a second look. An adapter that was never trained is warned of at once."""
    untrained = note_untrained(adapter, ops)
    if untrained:
        log.warning(untrained)
    notes = (
        note_quantization(adapter, base_weights),
        note_other_base(base_name, base, adapter),
        untrained,
        adapter.renamed,
    )
    return [note for note in notes if note]


def _write_weights(
    base: BaseModel,
    adapter: TensorFile,
    ops: list[TensorOp],
    quantization: Quantization | None,
    folder: Path,
) -> None:
    """Stream every shard of the base into `folder`; its index, where it has one, comes last."""
    op_of = {op.name: op for op in ops}
    with (
        Workers() as workers,
        contextlib.closing(progress(ops, total=len(ops), desc="merge", unit="tensor")) as bar,
    ):
        for shard in base.shards:
            tensors = {
                name: Copied(shard, name)
                if op_of[name].untouched
                else merged(op_of[name], shard, adapter, quantization)
                for name in shard.entries
            }
            for _ in write_weights(folder / shard.path.name, tensors, shard.metadata, workers):
                next(bar)
        assert next(bar, None) is None, "a planned tensor was not written"
    if base.index is not None:
        metadata = base.index.get("metadata", {}) | {"total_size": base.num_bytes}  # without headers
        write_json(folder / WEIGHTS_INDEX, base.index | {"metadata": metadata})
