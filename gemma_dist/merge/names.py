"""Adapters of other tools: their tensors under the names that PEFT gives them beside this base.

The same adapter comes with names that differ in three ways, of which PEFT itself would load nothing and say little:

    base_model.model.PATH.lora_A.default.weight    the adapter's own name, left in by who saved a raw state dict
    PATH.lora_A.weight                             without PEFT's prefix
    PATH under another root                        versions of transformers moved the language model about, and in the
                                                   class for text alone it stands elsewhere

A root is exchanged only where all tensors of the adapter then have their place, by one and the same exchange.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.plan import PREFIX
from gemma_dist.tensorfile import TensorFile

# Where the layers of the language model stand: in `Gemma4ForConditionalGeneration` of transformers 5, in that of 4, in
# `Gemma4ForCausalLM`, and in what is inside of them.
ROOTS = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
BEHIND_ROOT = re.compile(r"layers\.\d+\.|embed_tokens|norm\.")
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<kind>[AB]|magnitude_vector)(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?")


def with_names_of_peft(weights: TensorFile, base: Collection[str]) -> tuple[TensorFile, str | None]:
    """An adapter's file with its tensors under PEFT's names, and what was changed of them, in words.

    Args:
        base: the names of the base's tensors, as the class of the model has them.

    Raises:
        CheckpointError: the file holds several adapters, or two tensors that mean the same.
    """
    adapters = sorted({match["adapter"] for name in weights.entries if (match := FACTOR.fullmatch(name))} - {None})
    if len(adapters) > 1:
        raise CheckpointError(
            f"{weights.path} holds {len(adapters)} adapters in one file ({', '.join(adapters)}); save each by itself, "
            "with PEFT's save_pretrained(..., selected_adapters=[...])"
        )
    plain = {name: _plain(name) for name in weights.entries}
    if (roots := _exchange(plain.values(), base)) is not None:
        plain = {name: _moved(short, *roots) for name, short in plain.items()}
    entries = {PREFIX + plain[name]: entry for name, entry in weights.entries.items()}
    if len(entries) < len(weights.entries):
        raise CheckpointError(f"{weights.path} has tensors that mean the same, two of {min(entries)}; save it again")
    changed = [name for name in weights.entries if name != PREFIX + plain[name]]
    if not changed:
        return weights, None
    example = f"{changed[0]} was read as {PREFIX}{plain[changed[0]]}"
    return replace(weights, entries=entries), f"{len(changed)} tensors have names of another tool: {example}"


def _plain(name: str) -> str:
    """Without PEFT's prefix and the adapter's own name."""
    name = name.removeprefix(PREFIX)
    match = FACTOR.fullmatch(name)
    if match is None:
        return name
    return f"{match['path']}.lora_{match['kind']}" + ("" if match["kind"] == "magnitude_vector" else ".weight")


def _exchange(names: Iterable[str], base: Collection[str]) -> tuple[str, str] | None:
    """(old, new): the roots with whose exchange each tensor of an adapter has its module in the base. None where they
    have it already, or no exchange helps, or several would."""
    paths = {_module(name) for name in names}
    modules = {name.removesuffix(".weight") for name in base} | {name.rpartition(".")[0] for name in base}
    if paths <= modules:
        return None
    pairs = [(old, new) for old in ROOTS for new in ROOTS if old != new]
    found = [pair for pair in pairs if {_moved(path, *pair) for path in paths} <= modules]
    return found[0] if len(found) == 1 else None


def _module(name: str) -> str:
    """What a tensor of an adapter belongs to: a module of the base, or one of its tensors."""
    match = FACTOR.fullmatch(name)
    return (match["path"] if match else name.rpartition(".")[0]).replace(".base_layer", "")


def _moved(name: str, old: str, new: str) -> str:
    """`name` under another root, if it stands under the old one."""
    rest = name.removeprefix(old)
    return new + rest if name.startswith(old) and BEHIND_ROOT.match(rest) else name
