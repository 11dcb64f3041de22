"""An adapter as a server's own LoRA takes it. Of vLLM 0.33; what other servers and settings cannot load is refused.

Read in vllm 0.33.0 (`lora/lora_model.py`, `lora/peft_helper.py`, `lora/lora_weights.py`, `lora/model_manager.py`,
`config/lora.py`, `model_executor/models/gemma4.py` and `gemma4_mm.py`, `layers/fused_moe/routed_experts.py`):

- `base_model.model.model.language_model.layers.N.…` is mapped onto the modules of `Gemma4ForConditionalGeneration`;
  q_proj, k_proj and v_proj are slices of one qkv_proj, gate_proj and up_proj of one gate_up_proj.
- Full layers with `attention_k_eq_v` (12B, 26B-A4B, 31B) have no v_proj: transformers takes the values from k_proj.
  vLLM loads the weight of k_proj into both slices, but an adapter's factors only into that which they name. So the
  factors of k_proj are written as v_proj's, too: else the values would stay those of the base, without any error.
- A layer that shares another's keys and values has a q_proj alone, and its own k_proj and v_proj are never used.
- Experts are not a stack there (`is_3d_moe_weight` is false), but `experts.E.gate_proj`, `up_proj` and `down_proj`, all
  three of each expert.
- Rank and scale: one of each for all modules here, whatever patterns and rsLoRA say, by rows of zeros and factors in B.

SGLang 0.5.23 has no room for such an adapter: `get_hidden_dim` of `models/gemma4_mm.py` asks the composite config for a
`hidden_size` and one `head_dim` and `intermediate_size` of all layers, which Gemma 4 has not; its class for text alone
has `supports_lora = False`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gemma_dist.errors import CheckpointError
from gemma_dist.export.run import check_place
from gemma_dist.files import naming, whole_folder
from gemma_dist.logs import write_json
from gemma_dist.merge.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    BaseModel,
    note_other_base,
    note_quantization,
    open_adapter,
    open_base,
)
from gemma_dist.merge.names import with_names_of_peft
from gemma_dist.merge.plan import PREFIX, Lora, plan_merge
from gemma_dist.merge.run import names_in_model
from gemma_dist.tensorfile import Entry, TensorFile, header_bytes, write_tensor

Engine = Literal["vllm", "sglang"]

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank of vLLM takes
LINEAR = re.compile(
    r"(?P<layer>model\.(?:language_model\.)?layers\.(?P<number>\d+))\."
    r"(?P<module>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
STACK = re.compile(r"(?P<module>model\.(?:language_model\.)?layers\.\d+\.experts)\.(?P<weight>gate_up_proj|down_proj)")
KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Factor:
    """A tensor of the result: lora_A or lora_B of one module."""

    shape: tuple[int, int]
    values: Callable[[], torch.Tensor]  # float32


@dataclass(frozen=True)
class Attention:
    """Which layers have keys and values of another kind."""

    first_shared: int  # this one and those behind it use the keys and values of another
    keys_alone: frozenset[int]  # they have no v_proj, and their values are those of k_proj


@dataclass(frozen=True)
class AdapterReport:
    """What such an export did."""

    out: Path
    engine: Engine
    base: str
    rank: int
    num_modules: int
    notes: list[str]

    def summary(self) -> str:
        """A few lines for the terminal."""
        allowed = min(rank for rank in MAX_LORA_RANKS if rank >= self.rank)
        lines = [
            f"{self.out}: factors of {self.num_modules} modules, rank {self.rank}",
            f"  vllm serve {self.base} --enable-lora --max-lora-rank {allowed} --lora-modules tuned={self.out}",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def export_adapter(adapter: Path, base: Path | str, out: Path, engine: Engine) -> AdapterReport:
    """Write `adapter` to the folder `out` as `engine` loads it, complete or not at all.

    Args:
        base: the model that the adapter was trained on: a folder, or a name on the hub.

    Raises:
        ConfigError: `out` is taken, or is being written; or there is no room for it.
        CheckpointError: adapter and base do not fit, or the engine would not load it, or compute something else.
    """
    out = Path(out).resolve()
    opened, trained = open_base(base), open_adapter(Path(adapter))
    if engine == "sglang":
        raise CheckpointError(f"SGLang (0.5.23) loads no LoRA adapter for Gemma 4: {_instead(trained, base)}")
    weights, settings, renamed = with_names_of_peft(trained.weights, trained.settings, names_in_model(opened))
    headers, in_file = opened.headers, names_in_model(opened)
    ops = plan_merge(
        {name: headers[stored] for name, stored in in_file.items()},
        {name: (entry.dtype, entry.shape) for name, entry in weights.entries.items()},
        settings,
        tied_embeddings=opened.tied_embeddings,
        quantized_modules=(),
    )
    if whole := [op.name for op in ops if op.replaced_by is not None]:
        why = f"{whole[0]} was trained as a whole (modules_to_save, trainable_token_indices), and vLLM loads factors"
        raise CheckpointError(f"{why} alone: {_instead(trained, base)}")
    loras = {op.name: op.loras[0] for op in ops if op.loras}
    attention = attention_of(opened)
    unused = _require_loadable(loras, trained, attention, base)
    used = {name: lora for name, lora in loras.items() if name not in unused}
    factors, rank = _factors(used, weights, opened, attention)
    check_place(out, [trained.folder, opened.folder])
    entries = {name: Entry("F32", one.shape, 0, 4 * one.shape[0] * one.shape[1]) for name, one in factors.items()}
    with whole_folder(out, sum(entry.num_bytes for entry in entries.values())) as folder:
        with naming(folder / ADAPTER_WEIGHTS), (folder / ADAPTER_WEIGHTS).open("wb") as target:
            target.write(header_bytes(entries, {"format": "pt"}))
            for one in factors.values():
                write_tensor(target, one.values())
        modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in factors}
        write_json(folder / ADAPTER_CONFIG, adapter_settings(modules, rank, settings))
    notes = (
        f"{len(unused)} adapted k_proj and v_proj of layers that share others' were left out: nothing uses them"
        if unused
        else None,
        note_quantization(trained, "original") if trained.record else None,
        note_other_base(base, opened, trained),
        renamed,
    )
    return AdapterReport(out, engine, str(base), rank, len(factors) // 2, [note for note in notes if note])


def _instead(adapter: Adapter, base: Path | str) -> str:
    return f"serve the merged model instead, `gemma-dist merge --base {base} --adapter {adapter.folder} --out FOLDER`"


def _require_loadable(loras: Mapping[str, Lora], adapter: Adapter, attention: Attention, base: Path | str) -> set[str]:
    """Refuse what vLLM cannot load as it is meant; gives the adapted weights that nothing uses."""
    unused = set()
    for name, lora in loras.items():
        if lora.magnitude is not None:
            why = f"{name} was adapted with DoRA, which vLLM does not have and plain factors cannot say"
            raise CheckpointError(f"{why}: {_instead(adapter, base)}")
        linear = LINEAR.fullmatch(name)
        if linear is None and STACK.fullmatch(name) is None:
            why = f"{name} was adapted, and vLLM has LoRA for the linear layers and experts of the language model"
            raise CheckpointError(f"{why} alone (towers: an experiment): {_instead(adapter, base)}")
        if linear and linear["module"] in KEYS_AND_VALUES and int(linear["number"]) >= attention.first_shared:
            unused.add(name)
    if unused == loras.keys():
        raise CheckpointError(f"{adapter.folder} adapts nothing that is used; give the adapter of this base")
    return unused


def attention_of(base: BaseModel) -> Attention:
    """Of a base, by its config.json with transformers' defaults. Raises CheckpointError where it has none of them."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config()
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"transformers cannot read the config of {base.folder} ({error}); update it") from error
    keys_alone = [number for number, kind in enumerate(text.layer_types) if kind == "full_attention"]
    return Attention(
        text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0),
        frozenset(keys_alone if getattr(text, "attention_k_eq_v", False) else ()),
    )


def _factors(
    loras: Mapping[str, Lora], weights: TensorFile, base: BaseModel, attention: Attention
) -> tuple[dict[str, Factor], int]:
    """The tensors of the result, all of one rank, with a scale of 1; and that rank."""
    rank = max(_rank(lora, weights) for lora in loras.values())
    if rank > MAX_LORA_RANKS[-1]:
        raise CheckpointError(f"the adapter has rank {rank}, and vLLM takes up to {MAX_LORA_RANKS[-1]}: merge it")
    read = functools.lru_cache(4)(weights.read)
    found: dict[str, Factor] = {}
    stacks: dict[str, dict[str, Lora]] = {}
    for name, lora in loras.items():
        if stack := STACK.fullmatch(name):
            stacks.setdefault(stack["module"], {})[stack["weight"]] = lora
            continue
        match = LINEAR.fullmatch(name)
        assert match is not None, name
        modules = [match["module"]]
        if match["module"] == "self_attn.k_proj" and int(match["number"]) in attention.keys_alone:
            modules.append("self_attn.v_proj")
        for module in modules:
            found |= _pair(f"{match['layer']}.{module}", lora, weights, read, rank)
    shapes = {name: shape for name, (_, shape) in base.headers.items()}
    for module, by_weight in stacks.items():
        found |= dict(_experts(module, by_weight, shapes, read, rank))
    return found, rank


def _rank(lora: Lora, weights: TensorFile) -> int:
    return weights.entries[lora.a].shape[0] // (lora.num_experts or 1)


def _pair(
    module: str, lora: Lora, weights: TensorFile, read: Callable[[str], torch.Tensor], rank: int
) -> dict[str, Factor]:
    """Both factors of a linear layer."""
    shape_a, shape_b = weights.entries[lora.a].shape, weights.entries[lora.b].shape
    return {
        f"{PREFIX}{module}.lora_A.weight": Factor(
            (rank, shape_a[1]), lambda: filled(read(lora.a).float(), rank, shape_a[1])
        ),
        f"{PREFIX}{module}.lora_B.weight": Factor(
            (shape_b[0], rank), lambda: filled(read(lora.b).float() * lora.scale, shape_b[0], rank)
        ),
    }


def filled(values: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """`values` with rows and columns of zeros behind them."""
    return torch.nn.functional.pad(values, (0, num_columns - values.shape[1], 0, num_rows - values.shape[0]))


def _experts(
    module: str,
    loras: Mapping[str, Lora],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    rank: int,
) -> Iterator[tuple[str, Factor]]:
    """Both factors of each projection of each expert of a layer; of a stack that was not adapted, zeros."""
    num_experts, width, hidden = shapes[f"{module}.gate_up_proj"]
    half = width // 2
    # Of each projection its stack, the rows of it, and its inputs.
    projections = {
        "gate_proj": ("gate_up_proj", 0, half, hidden),
        "up_proj": ("gate_up_proj", half, width, hidden),
        "down_proj": ("down_proj", 0, hidden, half),
    }
    for expert in range(num_experts):
        for projection, (stack, first, last, inputs) in projections.items():
            values = functools.partial(_of_expert, loras.get(stack), expert, read, rank, (first, last), inputs)
            path = f"{PREFIX}{module}.{expert}.{projection}"
            yield f"{path}.lora_A.weight", Factor((rank, inputs), functools.partial(values, "A"))
            yield f"{path}.lora_B.weight", Factor((last - first, rank), functools.partial(values, "B"))


def _of_expert(
    lora: Lora | None,
    expert: int,
    read: Callable[[str], torch.Tensor],
    rank: int,
    rows: tuple[int, int],
    inputs: int,
    kind: Literal["A", "B"],
) -> torch.Tensor:
    """A factor of one expert out of those of its stack (`merge.plan.Lora` says how they lie there)."""
    num_rows = rows[1] - rows[0]
    if lora is None:
        return torch.zeros((rank, inputs) if kind == "A" else (num_rows, rank))
    assert lora.num_experts is not None
    if kind == "A":
        a = read(lora.a)
        return filled(a.view(lora.num_experts, -1, a.shape[1])[expert].float(), rank, inputs)
    b = read(lora.b)
    own = b.view(len(b), -1, lora.num_experts)[rows[0] : rows[1], :, expert]
    return filled(own.float() * lora.scale, num_rows, rank)


def adapter_settings(modules: Iterable[str], rank: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of plain LoRA with a scale of 1, of the base and for the task that are `known`."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": known.get("base_model_name_or_path"),
        "task_type": known.get("task_type"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # As whole paths: by the last part alone, PEFT would adapt the towers, too.
        "target_modules": sorted(modules),
    }
