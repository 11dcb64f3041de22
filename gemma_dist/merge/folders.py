"""The folders of a merge: the base and the adapter that it reads, and what the folder that it writes must fit.

Everything here happens before a byte of the result is written. Weights are opened, that is their headers are read; the
tensors themselves come later, one at a time.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_dist.errors import CheckpointError, ConfigError, setting
from gemma_dist.files import require_free, size
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.folder import refuse_custom_code, require_embeddings
from gemma_dist.tensorfile import TensorFile, open_tensors

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
    if base_weights not in ("as_trained", "original"):
        raise ConfigError(f"base_weights {base_weights!r} is not known; use as_trained or original")
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


def note_other_base(
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


def find_side_files(base: Path, adapter: Path) -> dict[str, tuple[Path, str]]:
    """Config, tokenizer, processor and template of the result: name -> (file, whether of "base" or "adapter")."""
    found = {"config.json": (base / "config.json", "base")}
    for name in SIDE_FILES:
        for folder, label in ((adapter, "adapter"), (base, "base")):
            if (folder / name).is_file():
                found[name] = (folder / name, label)
                break
    return found


def check_tokenizer(side_files: Mapping[str, tuple[Path, str]], base: BaseModel, adapter: Path) -> None:
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


def check_out(out: Path, base: BaseModel, adapter: Path) -> None:
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
