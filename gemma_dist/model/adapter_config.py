"""`adapter_config.json`, the settings that PEFT keeps beside an adapter: each of the kind that PEFT writes, or refused.

Whoever reads the file reads it here: PEFT itself takes whatever stands there, and fails somewhere else.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_dist.errors import CheckpointError, shortened
from gemma_dist.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json_object, refuse_pickle

MOST = 2**31  # of layers, of tokens, of a rank: far beyond any
Kind = tuple[Callable[[Any], bool], str]  # of a value: whether it is of that kind, and the kind in words


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter in a folder.

    Raises:
        CheckpointError: there is no such file, or one that PEFT did not write.
    """
    path = folder / ADAPTER_CONFIG
    problem = "the adapter's settings are broken" if path.is_file() else "the adapter is not a folder that PEFT saved"
    settings = read_json_object(path, problem)
    if found := odd_value(settings, LORA if settings.get("peft_type") == "LORA" else OF_ALL):
        raise CheckpointError(
            f"{path}: {found}, as PEFT writes it; take the file from the training's result once more, or correct it"
        )
    return settings


def require_adapter(folder: Path) -> None:
    """Raises CheckpointError unless settings and weights of an adapter can be read in a folder, the latter as far as
    their header: PEFT's own errors name no file. And where the weights are a pickle."""
    from gemma_dist.tensorfile import open_tensors  # torch: processes that shard come by here without it

    refuse_pickle(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is no adapter: it holds no {ADAPTER_CONFIG}; name a folder that PEFT, or a run with tuning: "
            "lora, saved"
        )
    read_adapter_config(folder)
    open_tensors(folder / ADAPTER_WEIGHTS)


def odd_value(settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str:
    """The first value that is not of its kind, in words; empty where each is."""
    for key, (is_right, words) in kinds.items():
        if key in settings and not is_right(settings[key]):
            return f"{key} = {shortened(json.dumps(settings[key], ensure_ascii=False))} is not {words}"
    return ""


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def is_rank(value: Any) -> bool:
    """Whether a value is a whole number above 0, as ranks and sizes are."""
    return type(value) is int and 0 < value < MOST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError):
        return False
    return True


def _is_end(value: str) -> bool:
    """Whether a key is a regular expression where PEFT puts it: at the end of a module's path."""
    return _is_pattern(rf"(.*\.)?({value})$")


def list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of such values."""
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _object_of(is_name: Callable[[Any], bool], is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_name, value)) and all(map(is_right, value.values()))


def _any_of(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(is_right(value) for is_right in kinds)


def _is_null(value: Any) -> bool:
    return value is None


def _or_null(is_right: Callable[[Any], bool], words: str) -> Kind:
    return _any_of(_is_null, is_right), f"{words} or null"


_TEXT = _or_null(is_text, "a text")
_TEXTS = _or_null(list_of(is_text), "a list of texts")
FLAG = _or_null(lambda value: isinstance(value, bool), "true, false")
_COUNTS = _any_of(_is_count, list_of(_is_count))
_TOKENS = _any_of(list_of(_is_count), _object_of(is_text, list_of(_is_count)))
_PATTERN = _or_null(_any_of(_is_pattern, list_of(is_text)), "a regular expression, a list of texts")
_OBJECT = _or_null(lambda value: isinstance(value, dict), "an object")

# Setting -> whether a value is of its kind, and that kind in words. Others have none: PEFT's own errors, and those of
# `merge/kinds.py`, are about them.
OF_ALL: dict[str, Kind] = {"peft_type": (is_text, "a text"), "base_model_name_or_path": _TEXT}
LORA: dict[str, Kind] = {
    **OF_ALL,
    **dict.fromkeys(("bias", "megatron_core", "peft_version", "revision", "task_type"), _TEXT),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_bias"), FLAG),
    **dict.fromkeys(("use_dora", "use_qalora", "use_rslora"), FLAG),
    **dict.fromkeys(("arrow_config", "auto_mapping", "corda_config", "eva_config", "kasa_config"), _OBJECT),
    **dict.fromkeys(("loftq_config", "lora_ga_config", "megatron_config", "monteclora_config"), _OBJECT),
    **dict.fromkeys(("runtime_config", "use_bdlora", "velora_config"), _OBJECT),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _TEXTS),
    **dict.fromkeys(("exclude_modules", "target_modules"), _PATTERN),
    "alora_invocation_tokens": _or_null(list_of(_is_count), "a list of tokens' ids"),
    "alpha_pattern": _or_null(
        _object_of(_is_end, is_number), "an object of regular expressions, each with a finite number,"
    ),
    "init_lora_weights": _or_null(lambda value: isinstance(value, bool | str), "true, false, a text"),
    "layer_replication": _or_null(list_of(list_of(_is_count)), "a list of pairs of layers"),
    "layers_pattern": _or_null(_any_of(is_text, list_of(is_text)), "a text, a list of texts"),
    "layers_to_transform": _or_null(_COUNTS, "a whole number from 0, a list of them"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "qalora_group_size": _or_null(is_rank, "a whole number above 0"),
    "r": (is_rank, "a whole number above 0"),
    "rank_pattern": _or_null(
        _object_of(_is_end, is_rank), "an object of regular expressions, each with a whole number above 0,"
    ),
    "trainable_token_indices": _or_null(_TOKENS, "a list of tokens' ids, an object of such lists"),
}
