"""Back to LoRA: of a base and a model that was tuned from it, the adapter whose sum with the base is nearest to that.

Matrix by matrix, D = tuned - base in float32, and B @ A of its r largest singular values: no other factors of rank r
come nearer to it. `torch.svd_lowrank` finds them (Halko et al., https://arxiv.org/abs/0909.4061), from 2r directions at
random, of a fixed seed, in NUM_ITERATIONS; even of pure noise, which is the worst case, their error is within a
thousandth of the least one. All weights of both models are compared, by blocks of rows; memory holds one matrix.
"""

import contextlib
import math
import re
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_dist.config_merge import ExtractConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.export.lora import adapter_settings, attention_of, filled
from gemma_dist.export.run import check_place
from gemma_dist.files import naming, whole_folder
from gemma_dist.logs import progress, write_json
from gemma_dist.merge.folders import ADAPTER_WEIGHTS, SIDE_FILES, BaseModel, check_room, open_base
from gemma_dist.merge.plan import PREFIX
from gemma_dist.merge.run import names_in_model
from gemma_dist.merge.stream import as_bytes, as_matrix, read_into, row_blocks
from gemma_dist.model.folder import ADAPTER_CONFIG, refuse_custom_code
from gemma_dist.model.record import write_extract_record
from gemma_dist.tensorfile import Entry, TensorFile, header_bytes, write_tensor

NUM_ITERATIONS, SEED = 8, 0
# The matrices of the language model that are a linear layer's: all but its embeddings.
LINEAR = re.compile(
    r"model\.(?:language_model\.)?(?:layers\.\d+\.(?P<kind>.+)|(?P<outer>per_layer_model_projection))\.weight"
)
KEYS_OR_VALUES = re.compile(
    r"model\.(?:language_model\.)?layers\.(?P<number>\d+)\.self_attn\.[kv]_(?:proj|norm)\.weight"
)


@dataclass(frozen=True)
class Pair:
    """A tensor of both models: the file of each, and the name there."""

    base: tuple[TensorFile, str]
    tuned: tuple[TensorFile, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        file, name = self.base
        return file.entries[name].shape


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did."""

    out: Path
    rank: int
    num_modules: int
    errors: dict[str, float]  # ||D - BA|| / ||D|| (Frobenius) of each kind of module, and of all under "total"
    seconds: float
    notes: list[str]

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.out}: factors of {self.num_modules} modules, rank {self.rank}, in {self.seconds:.1f} s",
            f"  of the change the adapter lacks {self.errors['total']:.3%} (Frobenius norm)",
            *(f"    {kind:<32}{error:>9.3%}" for kind, error in self.errors.items() if kind != "total"),
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def extract(base: Path | str, tuned: Path | str, out: Path, settings: ExtractConfig) -> ExtractReport:
    """Write the adapter that makes of `base` what is nearest to `tuned`, complete or not at all.

    Args:
        base, tuned: model folders, or names on the hub.

    Raises:
        ConfigError: `out` is taken, lies in a model, or is being written; there is no room for it; r is too large.
        CheckpointError: the models have other tensors; they do not differ; or they differ in what no factors hold.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    before, after = open_base(base, "BASE"), open_base(tuned, "TUNED")
    refuse_custom_code(after.folder)
    check_place(out, [before.folder, after.folder])
    pairs = _pairs(before, after)
    with contextlib.closing(progress(pairs, total=len(pairs), desc="compare", unit="tensor")) as names:
        changed = [name for name in names if _differs(pairs[name])]
    linear = {name: pairs[name] for name in changed if LINEAR.fullmatch(name) and len(pairs[name].shape) == 2}
    others = [name for name in changed if name not in linear]
    _require_extractable(linear, others, before, after, settings)
    num_bytes = sum(entry.num_bytes for entry in _entries(linear, settings.r).values())
    check_room(out, num_bytes)
    with whole_folder(out, num_bytes) as folder:
        errors = _write_factors(folder / ADAPTER_WEIGHTS, linear, settings.r)
        modules = [name.removesuffix(".weight") for name in linear]
        known = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
        write_json(folder / ADAPTER_CONFIG, adapter_settings(modules, settings.r, known))
        for name in SIDE_FILES:
            if (after.folder / name).is_file():
                shutil.copyfile(after.folder / name, folder / name)
        write_extract_record(folder, base=base, base_folder=before.folder, tuned=tuned, errors=errors, left_out=others)
    dtypes = sorted({file.entries[name].dtype for file, name in (pair.tuned for pair in linear.values())} - {"F32"})
    notes = [f"left out, though they changed: {_some(others)}"] if others else []
    notes += [f"{tuned} is in {dtype}: its rounding is part of the change, and of the error" for dtype in dtypes]
    return ExtractReport(out, settings.r, len(linear), errors, time.monotonic() - started, notes)


def _pairs(base: BaseModel, tuned: BaseModel) -> dict[str, Pair]:
    """The tensors of both models, by their names in the model's class: all but those that mean nothing.

    These are a tied head, and keys and values of layers that share those of others, which Google's files have and
    transformers does not save.

    Raises:
        CheckpointError: one has a tensor that the other lacks, or has in another shape.
    """
    first_shared = attention_of(base).first_shared
    tied = base.tied_embeddings and tuned.tied_embeddings

    def found(model: BaseModel) -> dict[str, tuple[TensorFile, str]]:
        """Name -> file, and name there."""
        shard_of = {name: shard for shard in model.shards for name in shard.entries}
        used = {}
        for name, stored in names_in_model(model).items():
            shared = KEYS_OR_VALUES.fullmatch(name)
            if not (shared and int(shared["number"]) >= first_shared) and not (tied and name == "lm_head.weight"):
                used[name] = (shard_of[stored], stored)
        return used

    ours, theirs = found(base), found(tuned)
    for has, lacks, names in (
        (base, tuned, ours.keys() - theirs.keys()),
        (tuned, base, theirs.keys() - ours.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{has.folder} has {_some(sorted(names))}, and {lacks.folder} has not; give the base that it was "
                "tuned from, in the same class of transformers"
            )
    pairs = {name: Pair(ours[name], theirs[name]) for name in ours}
    for name, pair in pairs.items():
        file, stored = pair.tuned
        if (shape := file.entries[stored].shape) != pair.shape:
            raise CheckpointError(
                f"{name} has shape {list(pair.shape)} in {base.folder} and {list(shape)} in {tuned.folder}; give the "
                "base that it was tuned from"
            )
    return pairs


def _some(names: Collection[str]) -> str:
    """The first few names, and how many there are."""
    listed = ", ".join(list(names)[:3])
    return listed if len(names) <= 3 else f"{len(names)} tensors such as {listed}"


def _rows(place: tuple[TensorFile, str], start: int, stop: int) -> torch.Tensor:
    """Some rows of a tensor taken as a matrix, in float32."""
    file, name = place
    entry, dtype = file.entries[name], file.dtype(name)
    room = torch.empty((stop - start, as_matrix(entry.shape)[2]), dtype=dtype)
    with file.path.open("rb") as opened:
        begin = entry.begin + start * room.shape[1] * dtype.itemsize
        read_into(opened.fileno(), as_bytes(room), begin, file.path)
    return room.float()


def _differs(pair: Pair) -> bool:
    return any(
        not torch.equal(_rows(pair.base, start, stop), _rows(pair.tuned, start, stop))
        for start, stop in row_blocks(pair.shape)
    )


def _require_extractable(
    linear: Mapping[str, Pair], others: Collection[str], base: BaseModel, tuned: BaseModel, settings: ExtractConfig
) -> None:
    """Raises CheckpointError where an adapter would say nothing, or not all; ConfigError for a rank beyond all."""
    if others and not settings.ignore_others:
        raise CheckpointError(
            f"{tuned.folder} differs from {base.folder} in {_some(others)} as well, which no factors of linear layers "
            "of the language model hold: the sum would be another model. Serve it as it is, or leave them out with "
            "--ignore-others"
        )
    if not linear:
        raise CheckpointError(
            f"nothing differs between the linear layers of {base.folder} and {tuned.folder}; give a model that was "
            "tuned, and the base that it was tuned from"
        )
    if settings.r > (most := max(min(pair.shape) for pair in linear.values())):
        raise ConfigError(f"--r {settings.r} is more than any of the matrices that differ can have; use --r {most}")


def _entries(linear: Mapping[str, Pair], rank: int) -> dict[str, Entry]:
    """The header of the adapter's file; lora_A of each module, (r, in), and then lora_B, (out, r)."""
    entries = {}
    for name, pair in linear.items():
        num_outputs, num_inputs = pair.shape
        module = PREFIX + name.removesuffix(".weight")
        for kind, shape in {"A": (rank, num_inputs), "B": (num_outputs, rank)}.items():
            entries[f"{module}.lora_{kind}.weight"] = Entry("F32", shape, 0, 4 * math.prod(shape))
    return entries


def _write_factors(path: Path, linear: Mapping[str, Pair], rank: int) -> dict[str, float]:
    """Write the adapter's file; gives the errors as `ExtractReport` has them."""
    lacking: dict[str, float] = {}  # squared Frobenius norms by kind
    whole: dict[str, float] = {}
    bar = progress(linear.items(), total=len(linear), desc="extract", unit="matrix")
    with naming(path), path.open("wb") as target, contextlib.closing(bar):
        target.write(header_bytes(_entries(linear, rank), {"format": "pt"}))
        for name, pair in bar:
            change = torch.empty(pair.shape)
            for start, stop in row_blocks(pair.shape):
                change[start:stop] = _rows(pair.tuned, start, stop) - _rows(pair.base, start, stop)
            norm = _squared(change)
            if not math.isfinite(norm):
                raise CheckpointError(f"{name} is not finite in one of the models; no factors come near it")
            b, a = largest_factors(change, rank)
            write_tensor(target, a)
            write_tensor(target, b)
            match = LINEAR.fullmatch(name)
            assert match is not None, name
            left = _squared(change.addmm_(b, a, alpha=-1))
            for kind in (match["kind"] or match["outer"], "total"):
                lacking[kind] = lacking.get(kind, 0.0) + left
                whole[kind] = whole.get(kind, 0.0) + norm
    return {kind: math.sqrt(lacking[kind] / whole[kind]) for kind in sorted(whole)}


def largest_factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) whose product is the nearest to a matrix (out, in); both with the roots of the singular
    values, and zeros beyond the rank that it can have."""
    num_outputs, num_inputs = change.shape
    possible = min(num_outputs, num_inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        u, values, v = torch.svd_lowrank(change, q=min(2 * rank, possible), niter=NUM_ITERATIONS)
    roots = values[:rank].sqrt()
    return filled(u[:, :rank] * roots, num_outputs, rank), filled((v[:, :rank] * roots).T, rank, num_inputs)


def _squared(matrix: torch.Tensor) -> float:
    """The squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
