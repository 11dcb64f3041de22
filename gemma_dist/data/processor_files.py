"""Which file of a model's folder keeps its processor from being loaded: the libraries that read them say no name."""

from pathlib import Path
from typing import Any

from gemma_dist.data.strict import reason
from gemma_dist.errors import CheckpointError
from gemma_dist.model.adapter_config import FLAG, Kind, is_number, is_rank, odd_value
from gemma_dist.model.folder import embedding_rows, read_json_object

SETTINGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
TOKENIZER = "tokenizer.json"


def _are_numbers(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(map(is_number, value)))


_SIZE: Kind = (is_rank, "a whole number above 0")
_COLORS: Kind = (_are_numbers, "a list of numbers or null")
IMAGES: dict[str, Kind] = {
    **dict.fromkeys(("max_soft_tokens", "patch_size", "pooling_kernel_size"), _SIZE),
    **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), FLAG),
    **dict.fromkeys(("image_mean", "image_std"), _COLORS),
    "rescale_factor": (is_number, "a number"),
}


def why_no_processor(folder: str, model: str, error: Exception) -> str:
    """What to say where loading a processor from `folder`, beside the config of `model`, ended with `error`."""
    place = Path(folder)
    found = _broken_setting(place) or _broken_tokenizer(place) or _broken_config(model) or _broken_part(place, error)
    return (
        f"no processor can be loaded from {folder!r}: {found}; download or save that again, or copy processor and "
        "tokenizer from the folder of the base"
    )


def require_image_settings(processor: Any, folder: str) -> None:
    """Raises CheckpointError where a setting of images is of another kind than the processor's arithmetic takes."""
    images = processor.image_processor
    if found := odd_value({key: getattr(images, key) for key in IMAGES if hasattr(images, key)}, IMAGES):
        raise CheckpointError(
            f"the image_processor of {folder!r} is broken: {found}; take processor_config.json of the base"
        )


def _broken_setting(folder: Path) -> str:
    for name in SETTINGS:
        if (folder / name).is_file():
            try:
                read_json_object(folder / name, "")
            except CheckpointError as error:
                return str(error).removeprefix(": ").partition(";")[0]
    return ""


def _broken_tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer

    if not (folder / TOKENIZER).is_file():
        return ""
    try:
        Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # of Rust, which knows no other kind
        return f"{folder / TOKENIZER} holds no tokenizer ({reason(error)})"
    return ""


def _broken_part(folder: Path, error: Exception) -> str:
    """Where all files can be read: which of them is absent, or holds a value that is none for transformers."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        return reason(error)
    if absent := [name for name in (SETTINGS[0], TOKENIZER) if not (folder / name).is_file()]:
        return f"{folder / absent[0]} is absent"
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as of_tokenizer:  # of such a value, anything may be raised
        return f"{folder / 'tokenizer_config.json'} holds what transformers refuses ({reason(of_tokenizer)})"
    return f"{folder / SETTINGS[0]} holds what transformers refuses ({reason(error)})"


def _broken_config(model: str) -> str:
    try:
        embedding_rows(model)
    except Exception as error:  # transformers checks each value, with errors of its own
        return f"config.json of {model!r} is refused by transformers ({reason(error)})"
    return ""
