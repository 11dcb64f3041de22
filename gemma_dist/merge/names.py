"""Adapters of other tools: their tensors under the names that PEFT gives them beside this base.

The same adapter comes with names that differ in three ways, and PEFT itself would load nothing and say little:

    base_model.model.PATH.lora_A.default.weight    the adapter's own name, left in by who saved a raw state dict
    PATH.lora_A.weight                             without PEFT's prefix
    PATH under another root                        the language model was moved about between versions of transformers
                                                   and stands elsewhere in the class for text alone

A root is exchanged only where all tensors of the adapter then have their place, by one and the same exchange.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.plan import PREFIX
from gemma_dist.tensorfile import TensorFile

# Where versions and classes of transformers keep the layers of the language model: `Gemma4ForConditionalGeneration`
# of 5.x, of 4.x, `Gemma4ForCausalLM`, and the bare language model.
ROOTS = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?:\.(?P<adapter>[^.]+))?(?P<weight>\.weight)?"
)
LAYER = re.compile(r"layers\.\d+\.|embed_tokens|norm\.")  # what stands behind a root


def with_names_of_peft(weights: TensorFile, base: Iterable[str]) -> tuple[TensorFile, str | None]:
    """An adapter's file with its tensors under PEFT's names, and what was changed of them, in words.

    Args:
        base: the names of the base's tensors, as the class of the model has them.

    Raises:
        CheckpointError: the file holds several adapters, or two tensors of one name.
    """
    names = {name: _plain(name) for name in weights.entries}
    adapters = sorted(
        {found["adapter"] for name in names if (found := FACTOR.fullmatch(name)) and found["adapter"]} - {"weight"}
    )
    if len(adapters) > 1:
        raise CheckpointError(
            f"{weights.path} holds {len(adapters)} adapters ({', '.join(adapters)}) in one file; save each by itself, "
            "with PEFT's save_pretrained(selected_adapters=[...])"
        )
    moved = _exchange(names.values(), set(base))
    if moved is not None:
        names = {name: _moved(plain, *moved) for name, plain in names.items()}
    changed = {name: PREFIX + plain for name, plain in names.items() if name != PREFIX + plain}
    if not changed:
        return weights, None
    entries = {changed.get(name, name): entry for name, entry in weights.entries.items()}
    if len(entries) < len(weights.entries):
        raise CheckpointError(
            f"{weights.path} has several tensors that mean the same, such as {min(changed)}; save it again"
        )
    example = next(iter(changed.items()))
    return replace(
        weights, entries=entries
    ), f"{len(changed)} tensors of the adapter have names of another tool: {example[0]} was read as {example[1]}"


def _plain(name: str) -> str:
    """Without PEFT's prefix and the adapter's own name."""
    name = name.removeprefix(PREFIX)
    found = FACTOR.fullmatch(name)
    if found is None:
        return name
    ending = ".weight" if found["kind"] != "lora_magnitude_vector" else ""
    return f"{found['path']}.{found['kind']}{ending}"


def _exchange(names: Iterable[str], base: set[str]) -> tuple[str, str] | None:
    """(old, new): the roots with whose exchange each tensor of the adapter has its module in the base; None where
    they all have it already, or no exchange helps, or more than one would."""
    paths = {_module(name) for name in names}
    modules = {name.removesuffix(".weight") for name in base} | {name.rpartition(".")[0] for name in base}
    if paths <= modules:
        return None
    found = [
        (old, new)
        for old in ROOTS
        for new in ROOTS
        if old != new and {_moved(path, old, new) for path in paths} <= modules
    ]
    return found[0] if len(found) == 1 else None


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    found = FACTOR.fullmatch(name)
    path = found["path"] if found else name.rpartition(".")[0]
    return path.replace(".base_layer", "")


def _moved(name: str, old: str, new: str) -> str:
    """`name` under another root, if it stands under the old one."""
    rest = name.removeprefix(old)
    return new + rest if name.startswith(old) and LAYER.match(rest) else name
