"""What settings of other tools would cost in memory, on the shapes of a recipe: why there are none of that name here.

The loss is computed by TRL's fused LM head, tile by tile, so that logits of 262,144 values a token never exist. What
asks for them all brings the model's own loss back: at its worst moment it holds them once in bfloat16 and three times
in float32 (simulated on the real modules; `transformers.loss.loss_utils`, and soft-capping before it):

    tokens x 262,144 x (1 x 2 + 3 x 4) bytes, at 4,096 tokens 14.0 GiB

`prepare_model_for_kbit_training` makes every weight that is not in 4 bits float32 (PEFT, `peft/utils/other.py`), so the
embeddings take twice their bytes:

    262,144 x (hidden + layers x per-layer width) x 2 bytes more, for E4B 6.5 GiB
"""

from collections.abc import Mapping
from typing import Any

from gemma_dist.family import VOCABULARY, known_config

COPIES_OF_LOGITS = ((1, 2), (3, 4))  # how many at once, of how many bytes a value
ASSUMED_TOKENS = 4096

# By the names of TRL, transformers, PEFT, axolotl and LLaMA-Factory.
WITH_FULL_LOGITS = (
    "label_smoothing_factor",
    "label_smoothing",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "compute_loss_func",
    "use_liger_kernel",
    "upcast_lmhead_output",
)
WITH_FLOAT32_BASE = ("prepare_model_for_kbit_training", "upcast_layernorm")


def full_logits_bytes(num_tokens: int) -> int:
    """What the logits of `num_tokens` take at the worst moment of the model's own loss."""
    return num_tokens * VOCABULARY * sum(number * size for number, size in COPIES_OF_LOGITS)


def float32_bytes(model: str) -> int | None:
    """What the embeddings of one of Google's models take more in float32; None: its sizes are not known."""
    config = known_config(model)
    if config is None:
        return None
    text = config["text_config"]
    width = text["hidden_size"] + text["num_hidden_layers"] * text.get("hidden_size_per_layer_input", 0)
    return VOCABULARY * width * 2


def cost_of(name: str, values: Mapping[str, Any]) -> str:
    """The end of a sentence about a setting that is refused: what it would cost; empty where it costs no memory.

    Args:
        name: of the setting, without a section.
        values: the sections of the recipe, unchecked.
    """
    if name in WITH_FULL_LOGITS:
        tokens, is_said = _tokens(values.get("train"))
        of = "this recipe's " if is_said else ""
        return (
            f"; at {of}{tokens:,} tokens that is {full_logits_bytes(tokens) / 2**30:.1f} GiB "
            f"({tokens:,} x {VOCABULARY:,} x 14 bytes)"
        )
    if name in WITH_FLOAT32_BASE:
        section = values.get("model")
        model = str(section.get("model_name_or_path")) if isinstance(section, Mapping) else ""
        more = float32_bytes(model)
        return "" if more is None else f"; for {model} that is {more / 2**30:.1f} GiB more"
    return ""


def _tokens(train: object) -> tuple[int, bool]:
    """Tokens of a micro-batch, and whether the section of an unchecked recipe says how long a sequence is."""
    values = train if isinstance(train, Mapping) else {}
    length, batch = values.get("packing_length"), values.get("per_device_train_batch_size")
    sequences = batch if type(batch) is int and batch > 0 else 1  # true is an int, too
    if type(length) is int and length > 0:
        return length * sequences, True
    return ASSUMED_TOKENS * sequences, False
