"""What of a model folder makes prompts and ends answers: tokenizer, processor, chat template, stop ids."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma_dist.config import EncodingConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.strict import short
from gemma_dist.data.templates import revision_of
from gemma_dist.errors import CheckpointError, ConfigError, GemmaDistError
from gemma_dist.gemma_format import (
    AUDIO,
    AUDIO_BEGIN,
    AUDIO_END,
    CONTROL_TOKENS,
    EOS,
    IMAGE,
    IMAGE_BEGIN,
    IMAGE_END,
    STOP_TOKENS,
    VIDEO,
)
from gemma_dist.model.folder import GENERATION_CONFIG, read_json_object
from gemma_dist.model.towers import UNIFIED
from gemma_dist.serving.commands import LLAMA_CPP
from gemma_dist.serving.rendering import check_for_llama_cpp, check_rendering
from gemma_dist.serving.report import Finding, ModelReport

TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
FROM_BASE = "copy it from the folder of the base"

# The ids of config.json by the tokens that they are to be.
CONFIG_IDS = {
    "boi_token_id": IMAGE_BEGIN,
    "image_token_id": IMAGE,
    "eoi_token_id": IMAGE_END,
    "boa_token_id": AUDIO_BEGIN,
    "audio_token_id": AUDIO,
    "eoa_token_id": AUDIO_END,
    "eoa_token_index": AUDIO_END,
    "video_token_id": VIDEO,
}


def check_prompts(folder: Path, config: Any, report: ModelReport) -> None:
    """Add to `report` which template the folder has, and what is wrong with all that makes prompts and ends answers.

    Args:
        config: of the model, as transformers reads it.
    """
    templates = _templates(folder)
    report.findings += _check_templates(templates)
    if templates:
        where, template = next(iter(templates.items()))
        report.chat_template = revision_of(template)
        report.findings += check_rendering(template, where) + check_for_llama_cpp(template, where, "note")
    try:
        encoder = _encoder(folder, has_template=bool(templates))
    except GemmaDistError as error:
        why = "no server can make a prompt, or see an image, without tokenizer and processor"
        report.findings.append(Finding("tokenizer and processor", str(error), why, FROM_BASE))
        return
    report.findings += _check_tokens(encoder.tokenizer, config)
    report.findings += _check_stops(folder, encoder.tokenizer, config)
    if config.model_type == UNIFIED and getattr(encoder.tokenizer, "response_template", None) is None:
        why = "it knows the calls of `gemma4`, and 12B is `gemma4_unified`"
        what = "plain `transformers serve` hands out a call of this model as text"
        report.findings.append(Finding("config.json", what, why, "start it by `gemma-dist serve`", "note"))
    if not _is_known_to_llama_cpp(folder / "tokenizer.json"):
        why = "it takes a BPE with byte_fallback and a decoder of several steps, as Gemma's own is; this is another one"
        what = "llama.cpp's converter does not know this tokenizer"
        report.findings.append(Finding("tokenizer.json", what, why, "serve it by one of the others", "note"))
        report.commands.pop(LLAMA_CPP, None)


def _encoder(folder: Path, *, has_template: bool) -> Encoder:
    """The encoder of a folder: without a template of its own that Jinja reads, with another one, so that the rest is
    looked at, too."""
    if has_template:
        with suppress(ConfigError):  # it is said where the template is rendered
            return load_encoder(str(folder), EncodingConfig())
    return load_encoder(str(folder), EncodingConfig(chat_template="gemma4_v5"))


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by the file that they lie in; the one that transformers takes comes first."""
    found = {}
    if (folder / TEMPLATE).is_file():
        found[TEMPLATE] = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    for name in (OLD_TEMPLATE, "tokenizer_config.json", "processor_config.json"):
        try:
            text = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, RecursionError, AttributeError):  # what is broken is said where it is loaded
            continue
        if isinstance(text, str):
            found[name] = text
    return found


def _check_templates(templates: Mapping[str, str]) -> list[Finding]:
    """Whether there is one template, and no second that says otherwise."""
    if not templates:
        return [
            Finding(
                TEMPLATE,
                "absent: the folder has no chat template",
                "servers refuse requests, or make up a format that the model does not know",
                f"{FROM_BASE}; a base that was never tuned to chat has none: take gemma4_v5, which TRL ships",
            )
        ]
    (first, text), *others = templates.items()
    return [
        Finding(
            name,
            f"holds another chat template than {first}",
            f"transformers, vLLM and SGLang take {first}; llama.cpp's converter takes tokenizer_config.json's",
            f"remove chat_template from {name}, or the file, so that all prompts are alike",
        )
        for name, other in others
        if other.strip() != text.strip()
    ]


def _check_tokens(tokenizer: Any, config: Any) -> list[Finding]:
    """Whether each control token is one token, and config.json means the same ids by them."""
    vocabulary = tokenizer.get_vocab()
    findings = []
    torn = [token for token in CONTROL_TOKENS if token not in vocabulary]
    torn += [token for token in CONTROL_TOKENS if token not in torn and not _is_one_token(tokenizer, token)]
    if torn:
        what = f"does not read {', '.join(torn)} as one token"
        why = "the model was trained on single ids, and servers look for them to find calls and ends"
        findings.append(Finding("tokenizer.json", what, why, FROM_BASE))
    text = config.get_text_config()
    wanted = {name: (config, vocabulary.get(token)) for name, token in CONFIG_IDS.items()}
    wanted |= {"bos_token_id": (text, tokenizer.bos_token_id), "pad_token_id": (text, tokenizer.pad_token_id)}
    for name, (section, known) in wanted.items():
        found = getattr(section, name, None)
        if found is not None and known is not None and found != known:
            findings.append(
                Finding(
                    "config.json",
                    f"{name} is {short(found)}, and the tokenizer's id is {known}",
                    "servers put images, pads and beginnings where the model does not look for them",
                    "take config.json and tokenizer from the same model",
                )
            )
    return findings


def _is_one_token(tokenizer: Any, token: str) -> bool:
    return tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def _check_stops(folder: Path, tokenizer: Any, config: Any) -> list[Finding]:
    """Whether a server stops where the model ends its turn, waits for a tool, or ends everything."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS}
    remedy = f"let eos_token_id be {list(ids.values())}"
    findings = []
    try:
        settings = read_json_object(folder / GENERATION_CONFIG, "the settings of generation are broken")
    except CheckpointError as error:
        what = str(error) if (folder / GENERATION_CONFIG).exists() else "absent"
        return [Finding(GENERATION_CONFIG, what, "servers do not know where an answer ends", f"write it: {remedy}")]
    stops = _as_set(settings.get("eos_token_id"))
    if lacking := [f"{token} ({number})" for token, number in ids.items() if number not in stops]:
        findings.append(
            Finding(
                GENERATION_CONFIG,
                f"eos_token_id is {short(settings.get('eos_token_id'))} and lacks {', '.join(lacking)}",
                "an answer does not end there: the model writes the tool's result, or the user's next turn, itself",
                remedy,
            )
        )
    own = _as_set(getattr(config, "eos_token_id", None)) or _as_set(
        getattr(config.get_text_config(), "eos_token_id", None)
    )
    if not own or not own <= set(ids.values()):
        what = f"eos_token_id is {sorted(own) or None}, and {EOS} is {ids[EOS]}"
        why = "llama.cpp and tools that read no generation_config.json end answers by it"
        findings.append(Finding("config.json", what, why, f"let it be {ids[EOS]}"))
    return findings


def _as_set(ids: Any) -> set[int]:
    if isinstance(ids, int):
        return {ids}
    return {number for number in ids if isinstance(number, int)} if isinstance(ids, list | tuple) else set()


def _is_known_to_llama_cpp(tokenizer: Path) -> bool:
    """Whether llama.cpp's converter takes a tokenizer.json: what `LlamaHfVocab` of its gguf package asks for."""
    settings = json.loads(tokenizer.read_text(encoding="utf-8"))
    model, decoder = settings["model"], settings.get("decoder") or {}
    return model.get("type") == "BPE" and model.get("byte_fallback") and decoder.get("type") == "Sequence"
