"""Add a LoRA adapter to its base model: from two folders to one that loads anywhere without PEFT.

Plan first (`plan.py` proves that every adapter tensor has its place), then stream: the result has the shards, names,
shapes and dtypes of the base, and what the adapter does not touch is copied byte for byte, including tensors that
transformers itself would drop on saving (K and V of layers that share them). The new folder appears under its name
only when it is whole and, if asked, verified.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gemma_dist.errors import CheckpointError, ConfigError, setting
from gemma_dist.files import naming, require_free, size, whole_folder
from gemma_dist.logs import log, progress, write_json
from gemma_dist.merge.plan import Lora, Step, plan_merge
from gemma_dist.merge.verify import check_memory
from gemma_dist.merge.verify import verify as compare
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.folder import refuse_custom_code, require_embeddings
from gemma_dist.tensorfile import Entry, TensorFile, open_tensors, write_header, write_tensor

BaseWeights = Literal["as_trained", "original"]

RECORD = "gemma_dist.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EMBEDDING = re.compile(r"\bembed_tokens(_per_layer)?\.weight$")  # the tables that a token's id looks up

# What stands beside the weights, apart from config.json: the adapter's own file wins where it has one, since training
# may have chosen another chat template or image size.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class BaseModel:
    """A model folder whose headers have been read."""

    folder: Path
    config: dict[str, Any]
    shards: list[TensorFile]  # no tensor is in two of them
    index: dict[str, Any] | None  # model.safetensors.index.json, where the base has one

    @property
    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (entry.dtype, entry.shape) for shard in self.shards for name, entry in shard.entries.items()}

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for shard in self.shards for entry in shard.entries.values())

    @property
    def tied_embeddings(self) -> bool:
        """Whether the LM head is the token embedding; so it is in every Gemma 4 unless the config says otherwise."""
        text = self.config.get("text_config") or {}
        return self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))


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
            lines.append(
                "  verified: largest logit difference {max_logit_difference:.2g}, KL {kl:.2g}, same top token "
                "{top1_agreement:.1%} of {num_positions} positions".format(**self.verification)
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def merge(base: Path | str, adapter: Path, out: Path, *, verify: bool, base_weights: BaseWeights) -> MergeReport:
    """Write base + adapter to the folder `out`, complete or not at all.

    Args:
        base: a model folder, or a name on the hub whose files are in the local cache or can be fetched.
        adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves it.
        verify: compare the logits of the result with those of base + adapter before the folder gets its name.
        base_weights: `as_trained` adds to the weights that training saw, which after QLoRA are those of the base taken
            to 4 bit and back (recorded in the adapter's `gemma_dist.json`); `original` to those of the base as it is.

    Raises:
        ConfigError: `out` is taken, lies in the base or the adapter, or is being written; or there is no room for it.
        CheckpointError: base and adapter do not fit, are incomplete or of a kind that cannot be merged; or the result
            failed the comparison.
    """
    started = time.monotonic()
    adapter, out = Path(adapter), Path(out).resolve()
    base_model = open_base(base)
    adapter_file, settings = open_adapter(adapter)
    _check_out(out, base_model, adapter)
    notes: list[str] = []
    base_weights, quantization = read_quantization(adapter, base_weights, notes)
    _note_other_base(base, base_model.folder, adapter, settings, notes)

    steps = _plan(base_model, adapter_file, settings, quantization)
    _note_untrained(adapter_file, steps, notes)
    side_files = _side_files(base_model.folder, adapter)
    _check_tokenizer(side_files, base_model, adapter)
    if verify:
        check_memory(base_model.headers)

    with whole_folder(out, base_model.num_bytes) as folder:
        _write_weights(base_model, adapter_file, steps, quantization, folder)
        for name, (source, _) in side_files.items():
            shutil.copyfile(source, folder / name)
        verification = None
        if verify:
            verification = compare(base_model.folder, adapter, folder, quantization=quantization)
        record = {
            "base_model": str(base),
            "adapter": str(adapter),
            "base_weights": base_weights,
            "quantization": quantization,  # what the base went through before the sum; null: nothing
            "verification": verification,
        }
        write_json(folder / RECORD, record)

    return MergeReport(
        out=out,
        base_weights=base_weights,
        num_tensors=len(steps),
        num_adapted=sum(step.lora is not None for step in steps),
        num_quantized=sum(step.quantized for step in steps),
        num_replaced=sum(step.replaced_by is not None for step in steps),
        num_bytes=base_model.num_bytes,
        seconds=time.monotonic() - started,
        side_files={name: label for name, (_, label) in side_files.items()},
        notes=notes,
        verification=verification,
    )


def open_base(base: Path | str) -> BaseModel:
    """Read config and headers of a model folder (or hub name) with safetensors weights in 16 or 32 bit."""
    folder = Path(base)
    if not folder.is_dir():
        folder = _download(str(base))
    config = _read_json(folder / "config.json", "the base is not a model folder")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} holds quantised weights (quantization_config in its config.json), which cannot be added to; "
            "give the 16-bit model that they were made from"
        )
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        return BaseModel(folder, config, [open_tensors(folder / WEIGHTS)], index=None)
    content = _read_json(index, "the base's index is broken")
    weight_map = content.get("weight_map", {})
    shards = [open_tensors(folder / name) for name in sorted(set(weight_map.values()))]
    found = {name: shard.path.name for shard in shards for name in shard.entries}
    if found != weight_map or len(found) != sum(len(shard.entries) for shard in shards):
        odd = sorted(set(found.items()) ^ set(weight_map.items()))
        raise CheckpointError(
            f"{index} and the files beside it disagree on {len(odd)} entries, such as {odd[0]}; download the base again"
        )
    return BaseModel(folder, config, shards, content)


def open_adapter(folder: Path) -> tuple[TensorFile, dict[str, Any]]:
    """The adapter's tensors and its `adapter_config.json`."""
    settings = _read_json(folder / "adapter_config.json", "the adapter is not a folder that PEFT saved")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds its weights as a pickle (adapter_model.bin), which can run code when read; load it with "
            "PEFT where you trust it and save it with safe_serialization=True"
        )
    return open_tensors(weights), settings


def read_quantization(
    adapter: Path, base_weights: BaseWeights, notes: list[str]
) -> tuple[BaseWeights, dict[str, Any] | None]:
    """What the merge adds to, and, if that is not the base as it is, how training held its frozen weights.

    The dictionary is the `quantization` of the adapter's `gemma_dist.json`: `bnb_4bit_quant_type`,
    `bnb_4bit_use_double_quant`, `modules` (paths of exactly the modules that were 4-bit) and, where the model was
    loaded in another dtype than its file's, `weights_dtype` (`float32`, `bfloat16`).
    """
    path = adapter / RECORD
    if not path.exists():
        if base_weights == "as_trained":
            notes.append(
                f"{path} is absent, so how the base was held in training is not known: added to the base's own "
                "weights. If it was trained on 4-bit weights, the result differs from what was trained"
            )
        return "original", None
    record = _read_json(path, "the record of the training is broken")
    quantization = record.get("quantization")
    if not quantization:
        return base_weights, None
    if base_weights == "original":
        notes.append("trained on 4-bit weights, added to the base's own: the result differs from what was trained")
        return base_weights, None
    kind = quantization.get("bnb_4bit_quant_type")
    if not quantization.get("load_in_4bit") or kind not in ("nf4", "fp4") or not quantization.get("modules"):
        raise CheckpointError(
            f"{path}: quantization {json.dumps({**quantization, 'modules': '…'})} is not a list of modules in 4-bit "
            "nf4 or fp4, the only ones whose weights can be made again; use "
            f"{setting('base_weights', 'original')}"
        )
    return base_weights, quantization


def four_bit_round_trip(weight: torch.Tensor, quantization: Mapping[str, Any]) -> torch.Tensor:
    """`weight` as a 4-bit layer of bitsandbytes holds it, made full again.

    Bit-equal to `dequantize_4bit(layer.weight.data, layer.weight.quant_state)` of the loaded layer: same block size
    (64, its default), same double quantisation, from and to the dtype that the weight was loaded in. Takes the whole
    tensor, since double quantisation subtracts the mean of all its block scales.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if dtype := quantization.get("weights_dtype"):
        weight = weight.to(getattr(torch, dtype))
    packed, state = quantize_4bit(
        weight,
        blocksize=64,
        compress_statistics=quantization.get("bnb_4bit_use_double_quant", False),
        quant_type=quantization["bnb_4bit_quant_type"],
    )
    return dequantize_4bit(packed, state)


def add_lora(weight: torch.Tensor, lora: Lora, adapter: TensorFile) -> torch.Tensor:
    """W + s * (B @ A) in float32; with DoRA, each row scaled from its norm to its trained magnitude.

    In PEFT's order of operations (`get_delta_weight` of `Linear` and `ParamWrapper`, `DoraLinearVariant.merge_unsafe`),
    so that the bits agree.
    """
    a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float()
    if lora.num_experts is None:
        delta = b @ a
    else:
        a, b = a.view(lora.num_experts, -1, a.shape[1]), b.view(len(b), -1, lora.num_experts)
        delta = torch.einsum("ore,eri->eoi", b, a)
    delta.mul_(lora.scale)
    merged = delta.add_(weight)  # summed in float32, whatever the weight's dtype
    if lora.magnitude is None:
        return merged
    scale = adapter.read(lora.magnitude).float() / torch.linalg.norm(merged, dim=1)
    return merged.mul_(scale.view(-1, 1))


def _plan(
    base: BaseModel, adapter: TensorFile, settings: Mapping[str, Any], quantization: Mapping[str, Any] | None
) -> list[Step]:
    return plan_merge(
        base.headers,
        {name: (entry.dtype, entry.shape) for name, entry in adapter.entries.items()},
        settings,
        tied_embeddings=base.tied_embeddings,
        quantized_modules=quantization["modules"] if quantization else (),
    )


def _write_weights(
    base: BaseModel,
    adapter: TensorFile,
    steps: list[Step],
    quantization: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Stream every shard of the base into `folder`, tensor by tensor; its index, where it has one, comes last."""
    step_of = {step.name: step for step in steps}
    with contextlib.closing(progress(steps, total=len(steps), desc="merge", unit="tensor")) as bar:
        for shard in base.shards:
            path = folder / shard.path.name
            with naming(path), path.open("wb") as target:
                write_header(target, shard.entries, shard.metadata)
                for name, entry in shard.entries.items():
                    next(bar)
                    if step_of[name].untouched:
                        shard.copy(name, target)
                    else:
                        write_tensor(target, _result(step_of[name], entry, shard, adapter, quantization))
        assert next(bar, None) is None, "a planned tensor was not written"
    if base.index is not None:
        metadata = base.index.get("metadata", {}) | {"total_size": base.num_bytes}  # without headers
        write_json(folder / WEIGHTS_INDEX, base.index | {"metadata": metadata})


def _result(
    step: Step, entry: Entry, shard: TensorFile, adapter: TensorFile, quantization: Mapping[str, Any] | None
) -> torch.Tensor:
    """One changed tensor, in the shape and dtype of the base's."""
    base = shard.read(step.name)
    if step.replaced_by is not None:
        result = adapter.read(step.replaced_by)
    else:
        result = base
        if step.quantized:
            assert quantization is not None
            result = four_bit_round_trip(result, quantization)
        if step.lora is not None:
            result = add_lora(result, step.lora, adapter)
    result = result.to(base.dtype)
    if not torch.stack(torch.aminmax(result)).isfinite().all():  # a NaN anywhere is both its least and its greatest
        raise CheckpointError(
            f"{step.name} would hold NaN or infinity after the merge: the training diverged, or {base.dtype} cannot "
            "hold the sum. Merge an earlier checkpoint of the adapter"
        )
    assert tuple(result.shape) == entry.shape
    return result


def _side_files(base: Path, adapter: Path) -> dict[str, tuple[Path, str]]:
    """Config, tokenizer, processor and template of the result: name -> (file, whether of "base" or "adapter")."""
    found = {"config.json": (base / "config.json", "base")}
    for name in SIDE_FILES:
        for folder, label in ((adapter, "adapter"), (base, "base")):
            if (folder / name).is_file():
                found[name] = (folder / name, label)
                break
    return found


def _check_tokenizer(side_files: Mapping[str, tuple[Path, str]], base: BaseModel, adapter: Path) -> None:
    """Refuse side files that no loader would take, or whose tokenizer has more tokens than the embeddings have rows."""
    from transformers import AutoTokenizer

    refuse_custom_code(base.folder)
    refuse_custom_code(adapter)
    if "tokenizer.json" not in side_files:
        return
    with tempfile.TemporaryDirectory() as folder:  # as they will stand together
        for name, (source, _) in side_files.items():
            (Path(folder) / name).symlink_to(source.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of Rust, of transformers, of json: a broken file may raise anything
            raise CheckpointError(
                f"the tokenizer of the result cannot be loaded ({error}); its files are tokenizer.json of the "
                f"{side_files['tokenizer.json'][1]} and those beside it: save or download them again"
            ) from error
    rows = {name: shape[0] for name, (_, shape) in base.headers.items() if EMBEDDING.search(name)}
    owner = adapter if side_files["tokenizer.json"][1] == "adapter" else base.folder
    require_embeddings(tokenizer, rows, tokenizer_of=owner, model=base.folder)


def _note_untrained(adapter: TensorFile, steps: list[Step], notes: list[str]) -> None:
    """Say so where every lora_B is zero, as it is at the start of training."""
    loras = [step.lora for step in steps if step.lora is not None]
    if loras and not any(adapter.read(lora.b).any() for lora in loras):
        notes.append(
            "every lora_B of the adapter is zero: it was never trained, and the result computes what the base does"
        )
        log.warning(notes[-1])


def _check_out(out: Path, base: BaseModel, adapter: Path) -> None:
    """Refuse a place that would overwrite something, or where the result cannot fit."""
    for folder, role in ((base.folder, "base"), (adapter, "adapter")):
        if out.is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {out} lies in the {role}'s folder {folder}; name a folder outside it")
    require_free(out)
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"--out {out} would lie in {parent}, which is a file; name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: you may not write in {parent}; change its permissions or name another folder")
    if (free := shutil.disk_usage(parent).free) < base.num_bytes:
        raise ConfigError(
            f"--out {out} needs {size(base.num_bytes)} and its disk has {size(free)} free; "
            "name a folder on another disk"
        )


def _note_other_base(
    base: Path | str, folder: Path, adapter: Path, settings: Mapping[str, Any], notes: list[str]
) -> None:
    """Sister models (base and instruction-tuned) have the same shapes: the hash that training recorded tells them
    apart, or else the name."""
    trained_on = settings.get("base_model_name_or_path") or ""
    record = _read_json(adapter / RECORD, "the record of the training is broken") if (adapter / RECORD).exists() else {}
    if known := record.get("base_weights_hash"):
        if known != fingerprint_base(str(folder))["base_weights_hash"]:
            notes.append(f"{base} holds other weights than those that the adapter was trained on ({trained_on})")
    elif trained_on and Path(trained_on).name != Path(base).name:
        notes.append(
            f"the adapter says that it was trained on {trained_on}, and was added to {base}: the same weights?"
        )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except Exception as error:  # the client's own family of errors has a dozen roots
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"--base {name} is neither a folder nor a model that could be fetched ({reason}); check the name"
        ) from None


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{problem}: {path} cannot be read ({error.strerror}); check the folder's name") from None
    except ValueError as error:
        raise CheckpointError(f"{problem}: {path} is not JSON ({error}); save or download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{problem}: {path} holds no JSON object; save or download it again")
    return value
