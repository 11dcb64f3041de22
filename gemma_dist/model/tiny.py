"""A tiny but real Gemma 4: transformers' own classes with random weights, a tokenizer and processor made on the spot.

It has everything that makes the large ones hard: sliding and full attention with two head sizes, KV sharing, per-layer
embeddings and an audio tower (`e4b`, and `e2b` with a single KV head and wider MLPs where K/V are shared),
bidirectional attention over images and K = V (`31b`), experts (`26b`), images without a vision tower (`12b`), clipped
vision linears, soft-capped logits, the newest chat template as each model has it. So whatever holds on it holds for a
reason.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_dist import gemma_format
from gemma_dist.errors import ConfigError
from gemma_dist.files import require_free, whole_folder
from gemma_dist.model.flat_sizes import add_flat_sizes

if TYPE_CHECKING:
    import torch

STYLES = ("e2b", "e4b", "12b", "26b", "31b")
WITH_AUDIO_TOWER = ("e2b", "e4b")  # also per-layer embeddings, shared K/V, causal images, and the smaller chat template

# Gemma's control tokens in the roles that its processor and template give them.
NAMED_TOKENS = {
    "boi_token": gemma_format.IMAGE_BEGIN,
    "image_token": gemma_format.IMAGE,
    "eoi_token": gemma_format.IMAGE_END,
    "boa_token": gemma_format.AUDIO_BEGIN,
    "audio_token": gemma_format.AUDIO,
    "eoa_token": gemma_format.AUDIO_END,
    "sot_token": gemma_format.TURN,
    "eot_token": gemma_format.TURN_END,
    "std_token": gemma_format.TOOL,
    "etd_token": gemma_format.TOOL_END,
    "stc_token": gemma_format.CALL,
    "etc_token": gemma_format.CALL_END,
    "str_token": gemma_format.RESPONSE,
    "etr_token": gemma_format.RESPONSE_END,
    "soc_token": gemma_format.CHANNEL,
    "eoc_token": gemma_format.CHANNEL_END,
    "think_token": gemma_format.THINK,
    "escape_token": gemma_format.QUOTE,
}

DEFAULT_CORPUS = (
    "call:run_sql{query:select month, sum(total) from sales where quarter = 'Q2' group by month}",
    "response:run_sql{value:month total\nApril 412\nMay 398\nJune 455}",
    "declaration:get_weather{description:The weather of a city.,parameters:{properties:{city:{description:Name of the "
    "city.,type:STRING}},required:[city],type:OBJECT}}",
    "You look after the sales figures. The user asks, the model calls a tool, the tool answers with a chart.",
    "model\nuser\nsystem\nthought\ntrue false null 0 1 2 3 4 5 6 7 8 9",
)


def write_tiny_model(
    out: Path,
    *,
    style: str = "e4b",
    corpus: Iterable[str] = DEFAULT_CORPUS,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    num_hidden_layers: int = 6,
    chat_template: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """Write a model folder (config, safetensors, tokenizer, processor, template) to `out`, complete or not at all.

    Args:
        style: `e4b` (KV sharing, per-layer embeddings), `e2b` (more of it), `31b` (bidirectional images, K = V), `26b`
            (and experts) or `12b` (like 31b, without a vision tower).
        corpus: lines that the byte-level BPE tokenizer learns its merges from.
        vocab_size: the largest vocabulary; a small corpus gives fewer merges and so a smaller one.
        hidden_size: width of the language model; heads and MLP follow it.
        num_hidden_layers: its depth, an even number: sliding and full attention alternate.
        chat_template: Jinja text; the newest template of the style's model when absent (`newest_template`).

    Raises:
        ConfigError: an unknown style; `out` exists and is not empty, or there is no room for it.
    """
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    if style not in STYLES:
        raise ConfigError(f"style {style!r} is not known; use one of {', '.join(STYLES)}")
    require_free(out)

    processor = tiny_processor(corpus, style=style, vocab_size=vocab_size, chat_template=chat_template)
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = tiny_config(tokenizer, style=style, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    _soften_attention(model)
    if style in WITH_AUDIO_TOWER:
        model = _with_audio_tower(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(gemma_format.STOP_TOKENS)),
    )

    model.to(getattr(torch, dtype))
    with whole_folder(out, model.get_memory_footprint()) as folder:
        model.save_pretrained(folder)
        add_flat_sizes(folder)
        processor.save_pretrained(folder)


def _soften_attention(model: "torch.nn.Module") -> None:
    """Scale the queries' norms so that attention begins spread out, and a tiny model learns to look in minutes.

    Gemma 4 normalizes queries and keys and does not divide by sqrt(head_dim) (the trained norms hold that), so with
    fresh norms of 1 every head would stare at one random token.
    """
    import torch

    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("q_norm"):
                module.weight.fill_(module.weight.numel() ** -0.5)


def _with_audio_tower(model: Any) -> Any:
    """The tower of E2B and E4B, which no trajectory feeds. Added to the finished model, whose other weights its seed
    gives with and without it."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    settings = model.config.to_dict() | {
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    }
    heard = Gemma4ForConditionalGeneration(Gemma4Config(**settings))
    heard.load_state_dict(model.state_dict(), strict=False)
    return heard


def shipped_templates() -> dict[str, Path]:
    """Gemma 4's chat templates that TRL ships, by their names, the newest last. TRL itself, which imports torch, is not
    imported."""
    found = find_spec("trl")
    assert found is not None
    folder = Path(str(found.origin)).parent / "chat_templates"
    return {path.stem: path for path in sorted(folder.glob("gemma4*.jinja"))}


def newest_template(style: str) -> str:
    """The newest chat template of a style's model, as Jinja text. The newest that TRL ships is that of E2B and E4B.

    Google's templates of 12B, 26B and 31B differ from it in the generation prompt: with thinking off, a new turn of the
    model opens with an empty thought, which no history shows.
    """
    shipped = shipped_templates()["gemma4_v5"].read_text(encoding="utf-8")
    if style in WITH_AUDIO_TOWER:
        return shipped
    head, add_generation_prompt, prompt = shipped.rpartition("{%- if add_generation_prompt -%}")
    turn = "{{- '<|turn>model\\n' -}}"
    assert prompt.count(turn) == 1, "TRL's template has another generation prompt"
    empty = repr(gemma_format.THOUGHT + gemma_format.CHANNEL_END)
    return (
        head
        + add_generation_prompt
        + prompt.replace(turn, f"{turn}{{%- if not enable_thinking -%}}{{{{- {empty} -}}}}{{%- endif -%}}")
    )


def tiny_processor(corpus: Iterable[str], *, style: str, vocab_size: int, chat_template: str | None) -> Any:
    """The real processor of a style (at most 70 soft tokens an image) around a BPE tokenizer trained on `corpus`."""
    tokenizer = _tokenizer(corpus, vocab_size)
    common = {
        "tokenizer": tokenizer,
        "chat_template": chat_template or newest_template(style),
        "image_seq_length": 70,
    }
    if style == "12b":
        from transformers.models import gemma4_unified as unified

        return unified.Gemma4UnifiedProcessor(
            feature_extractor=unified.Gemma4UnifiedAudioFeatureExtractor(),
            image_processor=unified.Gemma4UnifiedImageProcessor(max_soft_tokens=70),
            video_processor=unified.Gemma4UnifiedVideoProcessor(),
            **common,
        )
    from transformers.models import gemma4

    return gemma4.Gemma4Processor(
        feature_extractor=gemma4.Gemma4AudioFeatureExtractor(),
        image_processor=gemma4.Gemma4ImageProcessor(max_soft_tokens=70),
        video_processor=gemma4.Gemma4VideoProcessor(),
        **common,
    )


def _tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    """A fast tokenizer with Gemma's control tokens, and merges learned from `corpus`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits one by one, as in Gemma: numbers are copied digit by digit.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [
        gemma_format.PAD,
        gemma_format.EOS,
        gemma_format.BOS,
        gemma_format.UNK,
        gemma_format.MASK,
        *NAMED_TOKENS.values(),
        gemma_format.VIDEO,
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_without_control_tokens(corpus, specials), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=gemma_format.PAD,
        eos_token=gemma_format.EOS,
        bos_token=gemma_format.BOS,
        unk_token=gemma_format.UNK,
        mask_token=gemma_format.MASK,
        extra_special_tokens=NAMED_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _without_control_tokens(corpus: Iterable[str], specials: list[str]) -> Iterator[str]:
    """Lines cut at control tokens, so that no merge is spent on pieces of their names."""
    for line in corpus:
        for token in specials:
            line = line.replace(token, "\x00")
        yield from filter(None, line.split("\x00"))


def tiny_config(tokenizer: Any, *, style: str, hidden_size: int, num_hidden_layers: int) -> Any:
    """The config of a style, for the vocabulary of `tokenizer`."""
    from transformers import Gemma4Config, Gemma4UnifiedConfig

    ids = {}
    for name in ("boi_token", "image_token", "eoi_token", "boa_token", "audio_token"):
        ids[f"{name}_id"] = tokenizer.convert_tokens_to_ids(NAMED_TOKENS[name])
    text_config = _text_config(tokenizer, style, hidden_size, num_hidden_layers)
    ids["video_token_id"] = tokenizer.convert_tokens_to_ids(gemma_format.VIDEO)
    ids["eoa_token_index"] = tokenizer.convert_tokens_to_ids(gemma_format.AUDIO_END)
    if style == "12b":
        vision = {"mm_embed_dim": hidden_size, "mm_posemb_size": 128, "output_proj_dims": hidden_size}
        return Gemma4UnifiedConfig(text_config=text_config, vision_config=vision, audio_config={}, **ids)
    return Gemma4Config(text_config=text_config, vision_config=_vision_config(style), audio_config=None, **ids)


def _text_config(tokenizer: Any, style: str, hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    """The language model: what all styles have, then what tells them apart, as in the real models' configs."""
    vocab_size = len(tokenizer)
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": num_hidden_layers,
        "layer_types": ["sliding_attention", "full_attention"] * (num_hidden_layers // 2),
        "sliding_window": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 1 if style == "e2b" else 2,
        "head_dim": hidden_size // 4,
        "global_head_dim": hidden_size // 2,  # full layers have the larger heads, as in the real ones
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "initializer_range": hidden_size**-0.5,  # scaled embeddings of norm 1, as large as what the layers add to them
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if style in WITH_AUDIO_TOWER:
        return text | {
            "num_kv_shared_layers": num_hidden_layers - 2 if style == "e2b" else 2,
            "use_double_wide_mlp": style == "e2b",
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": vocab_size,
        }
    text |= {
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    if style != "12b":
        text["hidden_size_per_layer_input"] = 0
    if style == "26b":
        text |= {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": hidden_size // 2,
        }
    return text


def _vision_config(style: str) -> dict[str, Any]:
    """The vision tower, of one size for all styles that have one."""
    return {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "position_embedding_size": 1024,
        "initializer_range": 0.1,
        "use_clipped_linears": style in WITH_AUDIO_TOWER,
        "standardize": style not in WITH_AUDIO_TOWER,
    }
