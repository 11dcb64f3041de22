"""Add LoRA adapters to their base model: from two folders, or more, to one that loads anywhere without PEFT.

Plan first (`plan.py` proves that every adapter tensor has its place), then stream: the result has the shards, names,
shapes and dtypes of the base unless others are asked for, and what the adapters do not touch is copied byte for byte,
including tensors that transformers itself would drop on saving (K and V of layers that share them). The new folder
appears under its name only when it is whole and, if asked, verified.
"""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.files import whole_folder
from gemma_dist.logs import log, progress, write_json
from gemma_dist.merge.arithmetic import merged
from gemma_dist.merge.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHTS_INDEX,
    Adapter,
    BaseModel,
    BaseWeights,
    SideFile,
    as_peft_saves,
    check_out,
    check_room,
    check_side_files,
    find_side_files,
    note_other_base,
    note_quantization,
    note_untrained,
    open_adapter,
    open_base,
    read_quantization,
)
from gemma_dist.merge.four_bit import PackedWeight, linears_left_whole
from gemma_dist.merge.layout import Layout, config_in_dtype, lay_out
from gemma_dist.merge.names import with_names_of_peft
from gemma_dist.merge.plan import TensorOp, plan_merge
from gemma_dist.merge.several import combine, require_alike, require_comparable
from gemma_dist.merge.stream import Computed, Copied, Workers, write_weights
from gemma_dist.merge.verify import Samples, describe, read_samples
from gemma_dist.merge.verify import verify as compare
from gemma_dist.model.record import Quantization, four_bit_config, write_merge_record
from gemma_dist.model.vision import name_in_model
from gemma_dist.tensorfile import Entry


@dataclass(frozen=True)
class Plan:
    """A merge that is decided to the last tensor, and of which nothing is written."""

    base: BaseModel
    adapters: list[Adapter]
    base_weights: BaseWeights
    quantization: Quantization | None  # what the base's weights go through before the sum
    ops: list[TensorOp]  # one for each tensor of the base
    layout: Layout
    side_files: dict[str, SideFile]
    notes: list[str]
    config: dict[str, Any] | None  # of the result; None: that of the base
    packed: Mapping[str, PackedWeight] | None = None  # what is stored in 4 bits; None: everything is summed

    @property
    def keeps_dtypes(self) -> bool:
        """Whether each tensor of the result has the dtype of the base's."""
        stored = {name: entry.dtype for shard in self.base.shards for name, entry in shard.entries.items()}
        return all(stored[name] == entry.dtype for file in self.layout.files for name, entry in file.entries.items())


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    plan: Plan
    seconds: float
    verification: dict[str, Any] | None

    @property
    def notes(self) -> list[str]:
        """What is no error and yet worth a second look."""
        return self.plan.notes

    @property
    def num_adapted(self) -> int:
        """Tensors with something added."""
        return sum(bool(op.loras) for op in self.plan.ops)

    @property
    def num_quantized(self) -> int:
        """Tensors that went to 4 bit and back."""
        return sum(op.quantized for op in self.plan.ops)

    @property
    def num_replaced(self) -> int:
        """Tensors that the adapter has others for, or other rows."""
        return sum(op.replaced_by is not None for op in self.plan.ops)

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.out}: {len(self.plan.ops)} tensors, {self.plan.layout.num_bytes / 2**20:.1f} MiB, in "
            f"{self.seconds:.1f} s",
            self._what_became(),
        ]
        for origin in ("base", "adapter"):
            names = [name for name, file in self.plan.side_files.items() if file.origin == origin]
            if names:
                lines.append(f"  from the {origin}: {', '.join(names)}")
        if self.verification:
            lines += describe(self.verification)
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _what_became(self) -> str:
        """Of the tensors, in a line."""
        if self.plan.packed is not None:
            return f"  {len(self.plan.packed)} weights in 4 bits as trained, the adapter beside them: nothing was added"
        return (
            f"  adapter added to {self.num_adapted} tensors, {self.num_replaced} replaced, {self.num_quantized} taken "
            f"to 4 bit and back (base weights: {self.plan.base_weights}), the rest "
            f"{'copied byte for byte' if self.plan.keeps_dtypes else 'converted'}"
        )


def merge(
    base: Path | str,
    adapter: Path | Mapping[Path, float],
    out: Path,
    *,
    verify: bool | tuple[Path, int],
    base_weights: BaseWeights,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    save_in_4bit: bool = False,
) -> MergeReport:
    """Write base + adapter to the folder `out`, complete or not at all.

    Args:
        base: a model folder, or a name on the hub whose files are in the local cache or can be fetched.
        adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves it; or several, each
            with what its sum is multiplied by (`several.py`).
        verify: compare the logits of the result with those of base + adapter before the folder gets its name: on so
            many trajectories, the first ones, of a JSONL file or a folder of shards; True: on prompts that are made up.
        base_weights: `as_trained` adds to the weights that training saw, which after QLoRA are those of the base taken
            to 4 bit and back (recorded in the adapter's `gemma_dist.json`); `original` to those of the base as it is.
        dtype: of all tensors of the result; None: as in the base.
        max_shard_size: of the result's files, such as 5GB; None: those of the base.
        save_in_4bit: write the base in 4 bits, as QLoRA held it, and the adapter beside it; nothing is summed.

    Raises:
        DataError: those trajectories cannot be read.
        ConfigError: `out` is taken, lies in the base or the adapter, or is being written; or there is no room for it.
        CheckpointError: base and adapter do not fit, are incomplete or of a kind that cannot be merged; or the result
            failed the comparison.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    weights = adapter if isinstance(adapter, Mapping) else {Path(adapter): 1.0}
    plan = _plan(base, weights, out, base_weights, dtype, max_shard_size)
    if verify:
        require_comparable(plan.adapters)
    if save_in_4bit:
        plan = _in_4_bits(plan, weights, dtype, max_shard_size, verify=bool(verify))
    check_room(out, plan.layout.num_bytes)
    samples = read_samples(*verify, plan.base.folder, plan.adapters[0].folder) if isinstance(verify, tuple) else None

    with whole_folder(out, plan.layout.num_bytes) as folder:
        _write_weights(plan, folder)
        _write_side_files(plan, folder)
        verification = _compare_logits(plan, weights, folder, samples) if verify else None
        write_merge_record(
            folder,
            base=base,
            adapters={str(path): weight for path, weight in weights.items()},
            base_weights=plan.base_weights,
            quantization=plan.quantization,
            saved_in_4bit=save_in_4bit,
            verification=verification,
        )
    return MergeReport(out, plan, seconds=time.monotonic() - started, verification=verification)


def _compare_logits(plan: Plan, weights: Mapping[Path, float], folder: Path, samples: Samples | None) -> dict[str, Any]:
    with contextlib.ExitStack() as copies:
        # PEFT (0.21) loads no other adapter beside one with trained tokens, but that one beside others.
        in_order = sorted(plan.adapters, key=lambda one: bool(one.settings.get("trainable_token_indices")))
        known = [(copies.enter_context(as_peft_saves(one)), weights[one.folder]) for one in in_order]
        return compare(plan.base.folder, known, folder, quantization=plan.quantization, samples=samples)


def _plan(
    base: Path | str,
    weights: Mapping[Path, float],
    out: Path,
    base_weights: BaseWeights,
    dtype: str | None,
    max_shard_size: str | None,
) -> Plan:
    """Open the folders and decide everything that `merge` does, or raise what speaks against it."""
    opened, adapters = open_base(base), [open_adapter(path) for path in weights]
    check_out(out, opened, adapters)
    adapters = [_with_names_of_peft(one, opened) for one in adapters]
    require_alike(adapters, base_weights)
    quantization = read_quantization(adapters[0], base_weights)
    ops = _plan_tensors(opened, adapters, list(weights.values()), quantization)
    notes = _notes(base, opened, adapters, base_weights, ops)
    side_files = find_side_files(opened, adapters)
    check_side_files(side_files, opened, adapters)
    if all(one.record is None for one in adapters):
        base_weights = "original"
    layout = lay_out(opened, dtype=dtype, max_shard_size=max_shard_size)
    config = None if dtype is None else config_in_dtype(opened.config, dtype)
    return Plan(opened, adapters, base_weights, quantization, ops, layout, side_files, notes, config)


def _in_4_bits(
    plan: Plan, weights: Mapping[Path, float], dtype: str | None, max_shard_size: str | None, *, verify: bool
) -> Plan:
    """The plan that sums nothing, but puts base and adapter side by side.

    Raises:
        ConfigError: what else is asked for goes with a sum alone.
        CheckpointError: the adapter was not trained on layers in 4 bits, or on others too that transformers does not
            load so.
    """
    quantization = plan.quantization
    if dtype is not None or verify or len(weights) > 1 or set(weights.values()) != {1.0}:
        raise ConfigError(
            "--save-in-4bit sums nothing, so it goes neither with --dtype nor --verify, nor with a second --adapter or "
            "a weight; leave one of them out"
        )
    (adapter,) = plan.adapters
    if quantization is None:
        raise CheckpointError(
            f"--save-in-4bit: {adapter.folder} was not trained on a base in 4 bits, as far as its gemma_dist.json "
            "says, or --base-weights original leaves that aside; merge without it"
        )
    if stacks := quantization.get("parameters"):
        raise CheckpointError(
            f"--save-in-4bit: {stacks[0]} was held in 4 bits too, and transformers loads no experts so; merge without "
            "it, or train with quantize_moe_experts: false"
        )
    dora = any(lora.magnitude is not None for op in plan.ops for lora in op.loras)
    if dora or any(op.replaced_by is not None for op in plan.ops):
        kind = "is a DoRA adapter" if dora else "replaces weights of the base"
        raise CheckpointError(
            f"--save-in-4bit: {adapter.folder} {kind}, of which transformers (5.23) loads a part alone, without an "
            "error; merge without it"
        )
    shard_of = {name: shard for shard in plan.base.shards for name in shard.entries}
    packed = {op.name: PackedWeight(shard_of[op.name], op.name, quantization) for op in plan.ops if op.quantized}
    loaded_in = quantization.get("weights_dtype")
    settings = four_bit_config(quantization, skip_modules=linears_left_whole(plan.base.folder, quantization)).to_dict()
    config = config_in_dtype(plan.base.config, loaded_in) if loaded_in else plan.base.config
    return replace(
        plan,
        layout=lay_out(plan.base, dtype=loaded_in, max_shard_size=max_shard_size, packed=packed),
        packed=packed,
        config={**config, "quantization_config": settings},
    )


def _with_names_of_peft(adapter: Adapter, base: BaseModel) -> Adapter:
    weights, settings, note = with_names_of_peft(adapter.weights, adapter.settings, names_in_model(base))
    return replace(adapter, weights=weights, settings=settings, renamed=note)


def names_in_model(base: BaseModel) -> dict[str, str]:
    """The base's tensors: name in the model's class -> name in the file."""
    return {name_in_model(name, base.config.get("model_type", "")): name for name in base.headers}


def _plan_tensors(
    base: BaseModel, adapters: Sequence[Adapter], weights: Sequence[float], quantization: Quantization | None
) -> list[TensorOp]:
    """What becomes of each tensor of the base; `quantization` as `read_quantization` returns it."""
    headers, in_file = base.headers, names_in_model(base)
    plans = [
        plan_merge(
            {name: headers[stored] for name, stored in in_file.items()},
            adapter.headers,
            adapter.settings,
            tied_embeddings=base.tied_embeddings,
            quantized_modules=quantization["modules"] if quantization else (),
            quantized_parameters=quantization.get("parameters", ()) if quantization else (),
        )
        for adapter in adapters
    ]
    ops = combine(plans, weights, [str(adapter.folder) for adapter in adapters])
    return [replace(op, name=in_file[op.name]) for op in ops]


def _notes(
    base_name: Path | str,
    base: BaseModel,
    adapters: Sequence[Adapter],
    base_weights: BaseWeights,
    ops: Sequence[TensorOp],
) -> list[str]:
    """What is no error and yet worth a second look. An adapter that was never trained is warned of at once."""
    notes = []
    for number, adapter in enumerate(adapters):
        loras = [lora for op in ops for lora in op.loras if lora.adapter == number]
        untrained = note_untrained(adapter, loras)
        if untrained:
            log.warning(untrained)
        notes += [
            note_quantization(adapter, base_weights),
            note_other_base(base_name, base, adapter),
            untrained,
            adapter.renamed,
        ]
    return list(dict.fromkeys(note for note in notes if note))


def _write_weights(plan: Plan, folder: Path) -> None:
    """Stream every tensor of the base into the files of the result; the index, where it has one, comes last."""
    op_of = {op.name: op for op in plan.ops}
    shard_of = {name: shard for shard in plan.base.shards for name in shard.entries}
    adapters = [one.weights for one in plan.adapters]
    names = [name for file in plan.layout.files for name in file.entries]

    def tensor(name: str, entry: Entry) -> Copied | Computed:
        """What the result has under a name."""
        if plan.packed is not None:
            owner = name if name in plan.packed else name.partition(".weight.")[0] + ".weight"
            if owner in plan.packed:
                return plan.packed[owner].computed(name, entry)
        op = op_of[name] if plan.packed is None else TensorOp(name)
        shard = shard_of[name]
        if op.untouched and entry.dtype == shard.entries[name].dtype:
            return Copied(shard, name)
        return merged(op, shard, adapters, plan.quantization, entry)

    with (
        Workers() if plan.quantization is None else Workers(num_waiting=0) as workers,
        contextlib.closing(progress(names, total=len(names), desc="merge", unit="tensor")) as bar,
    ):
        for file in plan.layout.files:
            tensors = {name: tensor(name, entry) for name, entry in file.entries.items()}
            for _ in write_weights(folder / file.name, tensors, file.metadata, workers):
                next(bar)
        assert next(bar, None) is None, "a planned tensor was not written"
    if plan.layout.index is not None:
        write_json(folder / WEIGHTS_INDEX, plan.layout.index)


def _write_side_files(plan: Plan, folder: Path) -> None:
    """Config, tokenizer, processor and template; and the adapter, where it is not summed."""
    for name, file in plan.side_files.items():
        shutil.copyfile(file.path, folder / name)
    if plan.config is not None:
        write_json(folder / "config.json", plan.config)
    if plan.packed is not None:
        with as_peft_saves(plan.adapters[0]) as saved:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(saved / name, folder / name)
