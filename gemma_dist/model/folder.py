"""Where a model's folder is, and what its files say before it is loaded: whose classes it wants, which tokens it has.

No code from a model folder is ever run: every `from_pretrained` says `trust_remote_code=False` too, since without that
transformers asks whoever sits at the terminal.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_dist.errors import CheckpointError, shortened

# The files in which transformers looks for `auto_map`, classes that lie as Python files in the folder.
CLASS_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# Weights as torch.save writes them, for transformers, PEFT or others.
PICKLE = re.compile(r"(pytorch_model|model|adapter_model|consolidated|checkpoint)\b.*\.(bin|pt|pth|ckpt|pkl)")

# What is fetched of a model of the hub: weights, settings, tokenizer and templates, and no code.
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def local_folder(model: str | Path, named: str) -> Path:
    """The folder of a model: `model` itself, or the one in the cache for a hub name, fetched where it is not there yet.

    Raises:
        CheckpointError: there is no such model; the message begins with `named`, which says where the user named it.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        raise CheckpointError(f"{named} is a file; name the folder of a model, or a model of the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=MODEL_FILES))
    except Exception as error:  # the client's own family of errors has a dozen roots
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{named} is neither a folder nor a model that could be fetched ({reason}); check the name"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model of `folder` from, by name: the whole one, or else those that the index
    lists. Others may lie beside them, left by an earlier save. None where it has neither.

    Raises:
        CheckpointError: the index is broken.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).exists():
        return []
    problem = f"the index of the model in {folder} is broken"
    names = read_json_object(folder / WEIGHTS_INDEX, problem).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{problem}: {folder / WEIGHTS_INDEX} has no weight_map; save or download it again")
    return [folder / name for name in sorted(set(names.values()))]


def read_json_object(path: Path, problem: str) -> dict[str, Any]:
    """The object in a JSON file of a model or adapter folder.

    Raises:
        CheckpointError: there is no such file, or something else in it; the message begins with `problem`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{problem}: {path} cannot be read ({error.strerror}); check the folder's name") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{problem}: {path} is not JSON ({error}); save or download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{problem}: {path} holds no JSON object; save or download it again")
    return value


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError where an adapter alone stands in the place of a model."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").exists():
        return
    try:
        base = str(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        base = "BASE"
    raise CheckpointError(
        f"{folder} is an adapter, which is no model: name its base ({base}), and the adapter beside it where the "
        "command takes one, as `evaluate` and `chat` do, or make a model of both by `gemma-dist merge`"
    )


def read_model_config(model: str | Path, named: str) -> dict[str, Any]:
    """The config.json of a model folder, or of a model of the hub, which is fetched.

    Raises:
        CheckpointError: there is no such model, or an adapter in its place, or the file is broken; the message begins
            with `named`, or with the adapter's folder.
    """
    folder = local_folder(model, named)
    refuse_adapter(folder)
    return read_json_object(folder / "config.json", named)


def require_generation_config(model: str) -> None:
    """Raises CheckpointError where the settings of generation in a model's folder are none: transformers says neither
    file nor setting."""
    from transformers import GenerationConfig

    path = Path(model) / GENERATION_CONFIG
    if path.is_file():
        read_json_object(path, "the settings of generation are broken")
        try:
            GenerationConfig.from_pretrained(model)
        except Exception as error:  # of values that are none, anything may be raised
            raise CheckpointError(
                f"{path} holds what transformers refuses ({shortened(str(error))}); take the file of the base"
            ) from error


def refuse_custom_code(model: str | Path) -> None:
    """Refuse a model folder (or hub name, or adapter folder) whose files name classes of their own, or are pickles.

    Raises:
        CheckpointError: one does, even if transformers knows a class to take instead: that would be another one; or as
            `refuse_pickle`; or there is a file of that name, or a folder without any of these files.
    """
    if Path(model).is_file():
        raise CheckpointError(f"{str(model)!r} is a file; name the folder of a model, or a model of the hub")
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in (*CLASS_FILES, ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{str(model)!r} holds no {CLASS_FILES[0]} nor any other file of a model; name the folder of one, or a "
            "model of the hub"
        )
    refuse_pickle(Path(model))
    for name in CLASS_FILES:
        path = _find(model, name)
        if path is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # loading says what is wrong with it
            continue
        for auto_map in _auto_maps(content):
            raise CheckpointError(
                f"{str(model)!r}: {name} asks for code of its own, auto_map = {json.dumps(auto_map)}, and no code from "
                "a model folder is ever run; give a Gemma 4 that transformers' own classes load, or take auto_map out "
                "and name their class in the file"
            )


def refuse_pickle(folder: Path) -> None:
    """Refuse a folder whose weights are a pickle, and no safetensors.

    Raises:
        CheckpointError: they are: what opens a pickle runs what it says.
    """
    if any(folder.glob("*.safetensors")):
        return
    for path in sorted(folder.glob("*")):
        if PICKLE.fullmatch(path.name):
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({path.name}), which can run code when read; where you trust "
                "it, load it with transformers or PEFT there, and save it with save_pretrained, as safetensors"
            )


def require_embeddings(tokenizer: Any, rows: Mapping[str, int], *, tokenizer_of: str | Path, model: str | Path) -> None:
    """Refuse a tokenizer with ids that an embedding has no row for.

    Args:
        rows: how many each table of token embeddings has, by its name.

    Raises:
        CheckpointError: the largest id lies beyond one of them.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    for name, num_rows in rows.items():
        if largest >= num_rows:
            raise CheckpointError(
                f"the tokenizer of {str(tokenizer_of)!r} has ids up to {largest} ({token!r}), but {name} of "
                f"{str(model)!r} has {num_rows} rows, so ids up to {num_rows - 1}; give the tokenizer that the model "
                "came with, or a model whose embeddings were resized for this one (resize_token_embeddings) and trained"
            )


def embedding_rows(model: str) -> dict[str, int]:
    """Rows of each table of token embeddings, as the config has them; none where the folder has no config.

    Raises:
        ValueError, OSError: transformers cannot read the config.
    """
    from transformers import AutoConfig

    if _find(model, "config.json") is None:
        return {}
    text = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    rows = {"embed_tokens": text.vocab_size}
    if getattr(text, "hidden_size_per_layer_input", 0):
        rows["embed_tokens_per_layer"] = text.vocab_size_per_layer_input
    return rows


def _find(model: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a hub model in the cache or on the hub; None where it has none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    quiet = ("gated_repo", "missing_entries", "connection_errors")
    try:
        found = cached_file(str(model), name, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    except OSError:  # no such model: loading says so
        return None
    return Path(found) if found else None


def _auto_maps(value: Any) -> Iterator[Any]:
    """Every `auto_map` that is not empty, at any depth: processor_config.json holds those of its parts inside."""
    if isinstance(value, dict):
        if value.get("auto_map"):
            yield value["auto_map"]
        for inner in value.values():
            yield from _auto_maps(inner)


def has_experts(model: str) -> bool:
    """Whether a model folder, or a model of the hub, which is fetched, has experts: of the family, 26B-A4B alone.

    Raises:
        CheckpointError: there is no model at that place.
    """
    named = f"model.model_name_or_path = {model!r}"
    config = read_model_config(model, named)
    return bool(config.get("text_config", {}).get("enable_moe_block"))
