"""The folders of a merge: the base and the adapter that it reads, and what the folder that it writes must fit.

Everything here happens before a byte of the result is written. Weights are opened, that is their headers are read; the
tensors themselves come later, one at a time.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_dist.errors import CheckpointError, ConfigError, setting
from gemma_dist.files import require_free, size
from gemma_dist.logs import write_json
from gemma_dist.merge.plan import LORA_TENSOR, Headers, Lora
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHTS,
    WEIGHTS_INDEX,
    local_folder,
    read_json_object,
    read_model_config,
    refuse_custom_code,
    refuse_pickle,
    require_embeddings,
)
from gemma_dist.model.record import ADAPTER_RECORD, AdapterRecord, Quantization, read_record, why_not_in_4_bits
from gemma_dist.tensorfile import TensorFile, open_tensors, write_tensors

BaseWeights = Literal["as_trained", "original"]

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
TEMPLATES = ("chat_template.jinja", "chat_template.json")
CONFIGS_WITH_TEMPLATE = ("tokenizer_config.json", "processor_config.json")  # which may hold one, of older versions


@dataclass(frozen=True)
class BaseModel:
    """A model folder whose headers have been read."""

    folder: Path
    config: dict[str, Any]
    shards: list[TensorFile]  # no tensor is in two of them
    index: dict[str, Any] | None  # model.safetensors.index.json, where the base is loaded by one

    @property
    def headers(self) -> Headers:
        """Of all tensors, shard by shard."""
        headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for shard in self.shards:
            headers |= _headers(shard)
        return headers

    @property
    def tied_embeddings(self) -> bool:
        """Whether the LM head is the token embedding; so it is in every Gemma 4 unless the config says otherwise."""
        text = self.config.get("text_config") or {}
        return self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder whose header has been read."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    weights: TensorFile
    record: AdapterRecord | None  # gemma_dist.json; None for an adapter from elsewhere
    renamed: str | None = None  # what was changed of the names in the file (`names.py`), in words

    @property
    def headers(self) -> Headers:
        """Of all tensors, in the order of the file."""
        return _headers(self.weights)


@dataclass(frozen=True)
class SideFile:
    """A file of the result that is copied as it is."""

    path: Path
    origin: Literal["base", "adapter"]


def _headers(file: TensorFile) -> Headers:
    """Tensor name -> (dtype, shape), as `plan.py` looks at them."""
    return {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}


def open_base(base: Path | str, named: str = "--base") -> BaseModel:
    """Read config and headers of a model folder (or hub name) with safetensors weights in 16 or 32 bit.

    Args:
        named: the argument of the command line that gives it.

    Raises:
        CheckpointError: there is no such model, its files disagree, or its weights are quantized.
    """
    folder = local_folder(base, f"{named} {base}")
    config = read_model_config(folder, f"{named} {base} is not a model folder")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} holds quantized weights (quantization_config in its config.json), which cannot be added to; "
            "give the 16-bit model that they were made from"
        )
    refuse_pickle(folder)
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():  # the whole file first, as transformers loads it
        return BaseModel(folder, config, [open_tensors(folder / WEIGHTS)], index=None)
    content = read_json_object(index, f"the index of {named} {base} is broken")
    weight_map = content.get("weight_map", {})
    shards = [open_tensors(folder / name) for name in sorted(set(weight_map.values()))]
    found: dict[str, str] = {}  # tensor -> its shard, as `weight_map` has it
    for shard in shards:
        found |= dict.fromkeys(shard.entries, shard.path.name)
    in_two_shards = len(found) != sum(len(shard.entries) for shard in shards)
    if found != weight_map or in_two_shards:
        odd = sorted(set(found.items()) ^ set(weight_map.items()))
        raise CheckpointError(
            f"{index} and the files beside it disagree on {len(odd)} entries, such as {odd[0]}; download it again"
        )
    return BaseModel(folder, config, shards, content)


def open_adapter(folder: Path) -> Adapter:
    """Read settings, header and record of an adapter's folder, as PEFT saves it.

    Raises:
        CheckpointError: it is no such folder, a file of it is broken, or its weights are a pickle.
    """
    inner = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inner and not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_CONFIG} itself, but {' and '.join(path.name for path in inner)} in it: "
            f"give --adapter {inner[0]}"
        )
    settings = read_adapter_config(folder)
    refuse_pickle(folder)
    return Adapter(folder, settings, open_tensors(folder / ADAPTER_WEIGHTS), read_record(folder))


@contextlib.contextmanager
def as_peft_saves(adapter: Adapter) -> Iterator[Path]:
    """A folder of the adapter that PEFT reads whole: its own, or a copy for a while where its tensors were renamed."""
    if adapter.renamed is None:
        yield adapter.folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        modules = {match[1] for name in adapter.weights.entries if (match := LORA_TENSOR.fullmatch(name))}
        linear = sorted(module for module in modules if f"{module}.base_layer" not in modules)
        write_json(folder / ADAPTER_CONFIG, adapter.settings | {"target_modules": linear})
        write_tensors(folder / ADAPTER_WEIGHTS, {name: adapter.weights.read(name) for name in adapter.weights.entries})
        yield folder


def model_class(folder: Path) -> Any:
    """The class that config.json names: the automatic ones may choose another wrapper, with other tensor names."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["AutoModelForImageTextToText"])[0]
    if not hasattr(transformers, name):
        raise CheckpointError(f"{folder / 'config.json'}: architectures {name!r} is not in transformers; update it")
    return getattr(transformers, name)


def read_quantization(adapter: Adapter, base_weights: BaseWeights) -> Quantization | None:
    """What the base's weights go through before the sum; None: they are added to as they are.

    Raises:
        CheckpointError: the base was held in a way whose weights cannot be made again.
    """
    quantization = adapter.record.get("quantization") if adapter.record else None
    if not quantization or base_weights == "original":
        return None
    if why := why_not_in_4_bits(quantization):
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_RECORD}: {why}, as training writes it, so the weights that the adapter was "
            "trained on cannot be made again. Take the file from the training's result once more, or add the adapter "
            f"to the base as it is, by {setting('base_weights', 'original')}"
        )
    return quantization


def note_quantization(adapter: Adapter, base_weights: BaseWeights) -> str | None:
    """Say so where the result may differ from what was trained, since the sum takes other weights of the base."""
    if base_weights == "original":
        if adapter.record is not None and adapter.record.get("quantization"):
            return "trained on 4-bit weights, added to the base's own: the result differs from what was trained"
        return None
    if adapter.record is None:
        return (
            f"{adapter.folder / ADAPTER_RECORD} is absent, so how the base was held in training is not known: added to "
            "the base's own weights. If it was trained on 4-bit weights, the result differs from what was trained"
        )
    return None


def note_other_base(base_name: Path | str, base: BaseModel, adapter: Adapter) -> str | None:
    """Sister models (base and instruction-tuned) have the same shapes: the hash that training recorded tells them
    apart, or else the name."""
    trained_on = adapter.settings.get("base_model_name_or_path") or ""
    recorded_hash = adapter.record.get("base_weights_hash") if adapter.record else None
    if recorded_hash:
        if recorded_hash == fingerprint_base(str(base.folder))["base_weights_hash"]:
            return None
        return f"{base_name} holds other weights than those that the adapter was trained on ({trained_on})"
    if trained_on and Path(trained_on).name != Path(base_name).name:
        return f"the adapter says that it was trained on {trained_on}, and was added to {base_name}: the same weights?"
    return None


def note_untrained(adapter: Adapter, loras: Collection[Lora]) -> str | None:
    """Say so where every lora_B is zero, as it is at the start of training."""
    trained = any(adapter.weights.read(lora.b).any() for lora in loras)
    if trained or not loras:
        return None
    return f"every lora_B of {adapter.folder} is zero: it was never trained, and the result computes what the base does"


def find_side_files(base: BaseModel, adapters: Iterable[Adapter]) -> dict[str, SideFile]:
    """Config, tokenizer, processor and template of the result, by name."""
    chosen = choose_side_files([*(adapter.folder for adapter in adapters), base.folder])
    found = {"config.json": SideFile(base.folder / "config.json", "base")}
    for name, path in chosen.items():
        found[name] = SideFile(path, "base" if path.parent == base.folder else "adapter")
    return found


def choose_side_files(folders: Iterable[Path]) -> dict[str, Path]:
    """Each of SIDE_FILES from the first folder that has it.

    But for a chat template: transformers reads it from one of several places, and a later folder's file would hide that
    of an earlier one.
    """
    found: dict[str, Path] = {}
    has_template = False
    for folder in folders:
        brought = [name for name in SIDE_FILES if (folder / name).is_file()]
        for name in brought:
            if name not in found and not (has_template and name in TEMPLATES):
                found[name] = folder / name
        has_template = has_template or any(_holds_template(folder / name) for name in brought)
    return {name: found[name] for name in SIDE_FILES if name in found}


def _holds_template(path: Path) -> bool:
    """Whether a side file says how messages are rendered."""
    if path.name not in CONFIGS_WITH_TEMPLATE:
        return path.name in TEMPLATES
    return bool(read_json_object(path, "a file that is to go into the result is broken").get("chat_template"))


def check_side_files(side_files: Mapping[str, SideFile], base: BaseModel, adapters: Iterable[Adapter]) -> None:
    """Refuse side files that no loader would take, or whose tokenizer has more tokens than the embeddings have rows.

    Raises:
        CheckpointError: they are such files.
    """
    from transformers import AutoTokenizer

    for source in (base.folder, *(adapter.folder for adapter in adapters)):
        refuse_custom_code(source)
    if "tokenizer.json" not in side_files:
        return
    chosen = side_files["tokenizer.json"]
    with tempfile.TemporaryDirectory() as folder:  # as they will stand together
        for name, file in side_files.items():
            if name != "config.json":  # nothing of a tokenizer is in it, and its class takes a second to import
                (Path(folder) / name).symlink_to(file.path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of Rust, of transformers, of json: a broken file may raise anything
            raise CheckpointError(
                f"the tokenizer of the result cannot be loaded ({error}); its files are tokenizer.json of the "
                f"{chosen.origin} and those beside it: save or download them again"
            ) from error
    rows = {name: shape[0] for name, (_, shape) in base.headers.items() if EMBEDDING.search(name)}
    require_embeddings(tokenizer, rows, tokenizer_of=chosen.path.parent, model=base.folder)


def check_out(out: Path, base: BaseModel, adapters: Iterable[Adapter]) -> None:
    """Refuse a place that would overwrite something, or where nothing can be written.

    Args:
        out: an absolute path; folders above it may be missing, and the nearest one that exists is asked.

    Raises:
        ConfigError: `out` is such a place.
    """
    for folder, role in ((base.folder, "base"), *((adapter.folder, "adapter") for adapter in adapters)):
        if out.is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {out} lies in the {role}'s folder {folder}; name a folder outside it")
    require_free(out)
    parent = nearest_parent(out)
    if not parent.is_dir():
        raise ConfigError(f"--out {out} would lie in {parent}, which is a file; name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: you may not write in {parent}; change its permissions or name another folder")


def check_room(out: Path, num_bytes: int) -> None:
    """Raises ConfigError where the disk of `out` has less room than that."""
    if (free := shutil.disk_usage(nearest_parent(out)).free) < num_bytes:
        raise ConfigError(
            f"--out {out} needs {size(num_bytes)} and its disk has {size(free)} free; name a folder on another disk"
        )


def nearest_parent(out: Path) -> Path:
    """The folder, or file, nearest above a path that exists."""
    return next(parent for parent in out.parents if parent.exists())
