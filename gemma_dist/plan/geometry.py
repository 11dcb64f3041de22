"""The shape of a Gemma 4, read from the numbers of its config.json: every weight that it has, and which part it is of.

No weight is read and no model is built, so that the 31B takes no longer than a tiny one.

    geometry = read_geometry("google/gemma-4-E4B-it")
    sum(linear.inputs * linear.outputs for linear in linears(geometry))
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemma_dist.errors import CheckpointError
from gemma_dist.family import known_config
from gemma_dist.model.folder import read_model_config

PATCH_VALUES = 3 * 16 * 16  # colors x pixels of one patch
POSITIONS = 10_240  # rows of a vision tower's table of positions, for each direction
PATCHES_A_TOKEN = 9  # patches that the vision tower pools, or that 12B merges, into one soft token


@dataclass(frozen=True)
class Layer:
    """One layer of the language model."""

    is_full: bool  # attends to everything before; else within the sliding window
    head_dim: int
    kv_heads: int
    mlp: int  # width of its dense MLP
    shares_kv: bool  # takes keys and values of an earlier layer
    has_v: bool  # False: values are the keys


@dataclass(frozen=True)
class Tower:
    """An encoder of images or sound."""

    hidden: int
    layers: int
    mlp: int = 0
    head_dim: int = 0
    output: int = 0  # width of what it gives to its projector
    channels: tuple[int, int] = (0, 0)  # of the convolutions of an audio tower
    kernel: int = 0
    positions: int = POSITIONS
    input: int = PATCH_VALUES


@dataclass(frozen=True)
class Geometry:
    """A whole model."""

    hidden: int
    vocabulary: int
    heads: int
    window: int
    layers: tuple[Layer, ...]
    per_layer: int  # width of a layer's own embedding (PLE); 0: none
    per_layer_vocabulary: int
    experts: int  # of a layer; 0: none
    experts_a_token: int
    expert_mlp: int
    vision: Tower | None
    audio: Tower | None
    is_unified: bool  # 12B: images and sound are projected, not encoded


class Linear(NamedTuple):
    """A linear layer: its path in the model and its widths."""

    path: str
    part: str
    inputs: int
    outputs: int
    spared: bool = False  # bitsandbytes leaves it in 16 bits


class Stack(NamedTuple):
    """The weights of all experts of a layer in one parameter (experts, outputs, inputs)."""

    path: str
    experts: int
    outputs: int
    inputs: int

    @property
    def numel(self) -> int:
        """Its number of weights."""
        return self.experts * self.outputs * self.inputs


def read_geometry(model: str) -> Geometry:
    """The shape of a model: of a folder with a config.json, of one of Google's by its name on the hub, which need not
    be reachable, or of any other of the hub, which is fetched.

    Raises:
        CheckpointError: there is no such model, or it is no Gemma 4.
    """
    config = None if Path(model).is_dir() else known_config(model)
    if config is None:
        named = f"model.model_name_or_path = {model!r}"
        config = read_model_config(model, named)
    return geometry_of(config, model)


def geometry_of(config: Mapping[str, Any], model: str) -> Geometry:
    """The shape that a config.json describes. `model` is what messages call it.

    Raises:
        CheckpointError: it is no Gemma 4's, or lacks a number.
    """
    if not str(config.get("model_type", "")).startswith("gemma4"):
        raise CheckpointError(f"{model!r} is a {config.get('model_type')} model; gemma_dist knows Gemma 4 alone")
    try:
        text = config["text_config"]
        is_unified = config["model_type"] == "gemma4_unified"
        per_layer = text.get("hidden_size_per_layer_input") or 0
        return Geometry(
            hidden=text["hidden_size"],
            vocabulary=text["vocab_size"],
            heads=text["num_attention_heads"],
            window=text["sliding_window"],
            layers=tuple(_layers(text)),
            per_layer=per_layer,
            per_layer_vocabulary=per_layer and text["vocab_size_per_layer_input"],
            experts=(text.get("num_experts") or 0) if text.get("enable_moe_block") else 0,
            experts_a_token=text.get("top_k_experts") or 0,
            expert_mlp=text.get("moe_intermediate_size") or 0,
            vision=_vision(config.get("vision_config"), is_unified),
            audio=_audio(config.get("audio_config"), is_unified),
            is_unified=is_unified,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{model!r}: its config.json does not say {error}; download the model's files again"
        ) from None


def _layers(text: Mapping[str, Any]) -> Iterator[Layer]:
    """The layers of a text_config, which says what its full layers have otherwise in one of two ways: by names with
    `global` in them, as Google's files, or layer by layer (`per_layer_config`), as transformers writes it."""
    by_layer = text.get("per_layer_config") or {}
    k_is_v = text.get("attention_k_eq_v", False)
    first_shared = text["num_hidden_layers"] - text.get("num_kv_shared_layers", 0)
    for number, kind in enumerate(text["layer_types"]):
        is_full, shares = kind == "full_attention", number >= first_shared
        own = dict(by_layer.get(str(number), by_layer.get(number, {})))
        if is_full and not by_layer:
            own["head_dim"] = text.get("global_head_dim", 512)
            if k_is_v and text.get("num_global_key_value_heads"):
                own["num_key_value_heads"] = text["num_global_key_value_heads"]
        yield Layer(
            is_full=is_full,
            head_dim=own.get("head_dim", text["head_dim"]),
            kv_heads=own.get("num_key_value_heads", text["num_key_value_heads"]),
            mlp=text["intermediate_size"] * (2 if text.get("use_double_wide_mlp") and shares else 1),
            shares_kv=shares,
            has_v=not (k_is_v and is_full),
        )


def _vision(config: Mapping[str, Any] | None, is_unified: bool) -> Tower | None:
    """The encoder of images; of 12B its projection of merged patches."""
    if config is None:
        return None
    if is_unified:
        return Tower(
            hidden=config["mm_embed_dim"],
            layers=0,
            output=config["output_proj_dims"],
            positions=config["mm_posemb_size"],
            input=PATCH_VALUES * PATCHES_A_TOKEN,
        )
    return Tower(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        head_dim=config["head_dim"],
        output=config["hidden_size"],
        positions=config.get("position_embedding_size", POSITIONS),
    )


def _audio(config: Mapping[str, Any] | None, is_unified: bool) -> Tower | None:
    """The encoder of sound; of 12B nothing but the width of its frames."""
    if not config:
        return None
    if is_unified:
        return Tower(hidden=config["audio_embed_dim"], layers=0, output=config["audio_embed_dim"])
    first, second = config["subsampling_conv_channels"]
    return Tower(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp=4 * config["hidden_size"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        output=config["output_proj_dims"],
        channels=(first, second),
        kernel=config["conv_kernel_size"],
    )


# ---- every weight ----------------------------------------------------------------------------------------------------

TEXT = "language model"


def linears(geometry: Geometry) -> Iterator[Linear]:
    """Every linear layer, in the order of the model, the LM head not among them: it is the token embedding."""
    yield from _linears_of_vision(geometry)
    yield from _linears_of_text(geometry)
    yield from _linears_of_audio(geometry)
    for part, tower in (("vision", geometry.vision), ("audio", geometry.audio)):
        if tower is not None:
            inner = ".multimodal_embedder" if geometry.is_unified and part == "vision" else ""
            path = f"model.embed_{part}{inner}.embedding_projection"
            yield Linear(path, f"{part} tower", tower.output, geometry.hidden, spared=geometry.is_unified)


def _linears_of_text(geometry: Geometry) -> Iterator[Linear]:
    """Those of the language model."""
    hidden, per_layer = geometry.hidden, geometry.per_layer
    for number, layer in enumerate(geometry.layers):
        here = f"model.language_model.layers.{number}"
        queries, keys = geometry.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        widths = {"self_attn.q_proj": (hidden, queries)}
        if not layer.shares_kv:
            widths["self_attn.k_proj"] = (hidden, keys)
            if layer.has_v:
                widths["self_attn.v_proj"] = (hidden, keys)
        widths["self_attn.o_proj"] = (queries, hidden)
        widths |= {"mlp.gate_proj": (hidden, layer.mlp), "mlp.up_proj": (hidden, layer.mlp)}
        widths["mlp.down_proj"] = (layer.mlp, hidden)
        if per_layer:
            widths |= {"per_layer_input_gate": (hidden, per_layer), "per_layer_projection": (per_layer, hidden)}
        if geometry.experts:
            widths["router.proj"] = (hidden, geometry.experts)
        for name, (inputs, outputs) in widths.items():
            yield Linear(f"{here}.{name}", TEXT, inputs, outputs)
    if per_layer:
        path = "model.language_model.per_layer_model_projection"
        yield Linear(path, TEXT, hidden, len(geometry.layers) * per_layer)


def _linears_of_vision(geometry: Geometry) -> Iterator[Linear]:
    """Those of the vision tower, without its projector; of 12B the projection of its patches."""
    tower, part = geometry.vision, "vision tower"
    if tower is None:
        return
    if geometry.is_unified:
        yield Linear("model.embed_vision.patch_dense", part, tower.input, tower.hidden, spared=True)
        return
    yield Linear("model.vision_tower.patch_embedder.input_proj", part, tower.input, tower.hidden)
    for number in range(tower.layers):
        here = f"model.vision_tower.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Linear(f"{here}.self_attn.{name}.linear", part, tower.hidden, tower.hidden)
        yield Linear(f"{here}.mlp.gate_proj.linear", part, tower.hidden, tower.mlp)
        yield Linear(f"{here}.mlp.up_proj.linear", part, tower.hidden, tower.mlp)
        yield Linear(f"{here}.mlp.down_proj.linear", part, tower.mlp, tower.hidden)


def _linears_of_audio(geometry: Geometry) -> Iterator[Linear]:
    """Those of the audio tower, without its projector."""
    tower, part = geometry.audio, "audio tower"
    if tower is None or geometry.is_unified:
        return
    hidden, (first, second) = tower.hidden, tower.channels
    here = "model.audio_tower"
    yield Linear(f"{here}.subsample_conv_projection.input_proj_linear", part, first // 4 * second, hidden)
    for number in range(tower.layers):
        layer = f"{here}.layers.{number}"
        for name in ("feed_forward1", "feed_forward2"):
            yield Linear(f"{layer}.{name}.ffw_layer_1.linear", part, hidden, tower.mlp)
            yield Linear(f"{layer}.{name}.ffw_layer_2.linear", part, tower.mlp, hidden)
        for name in ("q_proj.linear", "k_proj.linear", "v_proj.linear", "post.linear", "relative_k_proj"):
            yield Linear(f"{layer}.self_attn.{name}", part, hidden, hidden)
        yield Linear(f"{layer}.lconv1d.linear_start.linear", part, hidden, 2 * hidden)
        yield Linear(f"{layer}.lconv1d.linear_end.linear", part, hidden, hidden)
    yield Linear(f"{here}.output_proj", part, hidden, tower.output)


def stacks(geometry: Geometry) -> Iterator[Stack]:
    """The stacked weights of the experts, two a layer."""
    if geometry.experts:
        number, hidden, mlp = geometry.experts, geometry.hidden, geometry.expert_mlp
        for layer in range(len(geometry.layers)):
            here = f"model.language_model.layers.{layer}.experts"
            yield Stack(f"{here}.gate_up_proj", number, 2 * mlp, hidden)
            yield Stack(f"{here}.down_proj", number, hidden, mlp)


def embeddings(geometry: Geometry) -> dict[str, int]:
    """Weights of the two tables of embeddings."""
    sizes = {"token embedding": geometry.vocabulary * geometry.hidden}
    if geometry.per_layer:
        width = len(geometry.layers) * geometry.per_layer
        sizes["per-layer embeddings"] = geometry.per_layer_vocabulary * width
    return sizes


def vectors(geometry: Geometry) -> dict[str, int]:
    """All weights that no linear layer, stack or table of embeddings has: norms, scales, biases, convolutions, and the
    positions of images; by part."""
    hidden = geometry.hidden
    norms = 5 if geometry.per_layer else 4
    text = hidden + (geometry.per_layer if geometry.per_layer else 0)
    for layer in geometry.layers:
        text += norms * hidden + layer.head_dim * (1 if layer.shares_kv else 2)
        if geometry.experts:
            text += 3 * hidden + hidden + geometry.experts  # norms, and the router's two scales
    sizes = {TEXT: text}
    if (vision := geometry.vision) is not None:
        sizes["vision tower"] = 2 * vision.positions * vision.hidden
        if geometry.is_unified:
            sizes["vision tower"] += 2 * vision.input + (2 + 2 + 1) * vision.hidden
        sizes["vision tower"] += vision.layers * (4 * vision.hidden + 2 * vision.head_dim)
    if (audio := geometry.audio) is not None and not geometry.is_unified:
        (first, second), each = audio.channels, audio.hidden
        of_layer = 9 * each + audio.head_dim + audio.kernel * each
        convolutions = 9 * first + first + 9 * first * second + second
        sizes["audio tower"] = convolutions + audio.layers * of_layer + audio.output
    return sizes
