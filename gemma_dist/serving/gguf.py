"""`gemma-dist check-model FILE.gguf`: what llama.cpp reads in a GGUF file, beside the tensors."""

import shlex
from pathlib import Path
from typing import Any

from gemma_dist.data.gguf import read_metadata
from gemma_dist.data.templates import revision_of
from gemma_dist.errors import CheckpointError
from gemma_dist.gemma_format import (
    CALL,
    CALL_END,
    CHANNEL,
    CHANNEL_END,
    CONTROL_TOKENS,
    QUOTE,
    RESPONSE,
    RESPONSE_END,
    STOP_TOKENS,
)
from gemma_dist.serving.commands import LLAMA_CPP
from gemma_dist.serving.rendering import check_for_llama_cpp, check_rendering
from gemma_dist.serving.report import Finding, ModelReport

AGAIN = "convert the folder again, by a newer llama.cpp"
TEMPLATE, EOS_ID = "tokenizer.chat_template", "tokenizer.ggml.eos_token_id"
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"

# What its parser has to see: the converter gives these tokens the type USER_DEFINED, since CONTROL ones are not shown.
VISIBLE = (CHANNEL, CHANNEL_END, CALL, CALL_END, RESPONSE, RESPONSE_END, QUOTE)
CONTROL = 3


def check_gguf(path: Path) -> ModelReport:
    """What a GGUF file is, and what llama.cpp would stumble over in it.

    Raises:
        CheckpointError: it holds no Gemma 4.
        ConfigError: it is damaged.
    """
    metadata = read_metadata(path)
    architecture = metadata.get("general.architecture")
    if architecture != "gemma4":
        hint = "; it is the projector for images, which goes beside a model" if architecture == "clip" else ""
        raise CheckpointError(f"{path} holds no Gemma 4: its general.architecture is {architecture!r}{hint}")
    report = ModelReport(path, model_class=f"gemma4 of {metadata.get('gemma4.block_count')} layers")
    report.num_bytes = path.stat().st_size
    report.commands = {LLAMA_CPP: f"llama-server --model {shlex.quote(str(path))} --jinja"}
    report.findings = _check_tokens(metadata)
    template = metadata.get(TEMPLATE)
    if isinstance(template, str):
        report.chat_template = revision_of(template)
        report.findings += check_rendering(template, TEMPLATE) + check_for_llama_cpp(template, TEMPLATE, "fault")
    else:
        why = "llama-server falls back to ChatML, which the model does not know"
        remedy = "convert again from a folder with chat_template.jinja"
        report.findings.append(Finding(TEMPLATE, "absent", why, remedy))
    return report


def _check_tokens(metadata: dict[str, Any]) -> list[Finding]:
    """Whether control tokens are there, can be seen by the parser, and end answers."""
    tokens, types = ((found if isinstance(found := metadata.get(key), list) else []) for key in (TOKENS, TYPES))
    id_of = {token: number for number, token in enumerate(tokens) if isinstance(token, str)}
    if lacking := [token for token in CONTROL_TOKENS if token not in id_of]:
        why = "the model was trained on these ids, and calls and ends are found by them"
        return [Finding(TOKENS, f"has no {', '.join(lacking)}", why, "convert from the base's own tokenizer")]
    findings = []
    if hidden := [token for token in VISIBLE if types[id_of[token] : id_of[token] + 1] == [CONTROL]]:
        why = "llama-server does not show control tokens to its parser, which then finds no calls and no thoughts"
        findings.append(Finding(TYPES, f"{', '.join(hidden)} of the type CONTROL", why, AGAIN))
    stops = [id_of[token] for token in STOP_TOKENS]
    if (eos := metadata.get(EOS_ID)) not in stops:
        why = "an answer does not end where the model ends it"
        findings.append(Finding(EOS_ID, f"is {eos}, none of {stops} ({', '.join(STOP_TOKENS)})", why, AGAIN))
    return findings
