"""Whether a chat template shows the model what a run of tool calls is made of."""

from typing import Any, Literal

from gemma_dist.data.strict import reason
from gemma_dist.data.templates import render
from gemma_dist.gemma_format import BOS, CALL, IMAGE, RESPONSE, TOOL, TURN
from gemma_dist.serving.report import Finding

NEWER = "take a newer revision: gemma4_v5, which TRL ships, or the base's newest"

# By these llama.cpp tells a template of Gemma 4, and a current one (common/chat.cpp).
KNOWN_TO_LLAMA_CPP = f"'{CALL}call:'"
CURRENT_TO_LLAMA_CPP = "{#- OpenAI Chat Completions:"

# A run of the kind that the template has to render: a call whose tool answers with text and an image.
TOOLS = [{"type": "function", "function": {"name": "plot_it", "description": "Draws.", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer"}, "title": {"type": "string"}}}}}]  # fmt: skip
ARGUMENTS = {"n": 7, "title": None}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Draw seven."},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_0", "type": "function", "function": {"name": "plot_it", "arguments": ARGUMENTS}}]},
    {"role": "tool", "tool_call_id": "call_0", "name": "plot_it", "content": [
        {"type": "text", "text": "drawn-by-seven"}, {"type": "image"}]},
]  # fmt: skip


def check_rendering(template: str, where: str) -> list[Finding]:
    """Whether a chat template declares tools, and shows a call, its result and the image in that.

    Args:
        where: the file that it lies in.
    """
    given = {"messages": HISTORY, "tools": TOOLS, "documents": None, "add_generation_prompt": True, "bos_token": BOS}
    try:
        text = render(template, given)
    except Exception as error:  # a template may raise anything: jinja's own errors, or its raise_exception
        return [Finding(where, f"cannot render a tool call: {reason(error)}", "a server answers with an error", NEWER)]
    lacking = {
        "declares no tools": f"{TOOL}declaration:plot_it",
        "does not show a call": f"{CALL}call:plot_it{{",
        "does not show a tool's result": "drawn-by-seven",
        "opens no turn of a user": f"{TURN}user",
    }
    findings = [
        Finding(where, what, "the model never sees it, and so cannot call tools as it was trained to", NEWER)
        for what, piece in lacking.items()
        if piece not in text
    ]
    if IMAGE not in text:
        why = "the model answers without having seen them; gemma4 and gemma4_v3 are such revisions"
        findings.append(Finding(where, "loses the images that a tool returns", why, NEWER))
    if f"{RESPONSE}response:plot_it{{" not in text:
        what = f"shows a tool's result outside of {RESPONSE}, where Google's newer templates have it; gemma4_v2 does so"
        why = "a model that was not trained with this very template has not seen results so"
        findings.append(Finding(where, what, why, NEWER, "note"))
    if "title:None" in text:
        why = "the model sees Python's None in the place of null; all revisions before gemma4_v5 do so"
        findings.append(Finding(where, "writes a null argument as None", why, NEWER, "note"))
    return findings


def check_for_llama_cpp(template: str, where: str, level: Literal["fault", "note"]) -> list[Finding]:
    """Whether llama.cpp takes a chat template for Gemma 4's, and for a current one.

    Args:
        where: the file that it lies in.
        level: of the first, without which it knows no calls.
    """
    if KNOWN_TO_LLAMA_CPP not in template:
        what = f"has no {KNOWN_TO_LLAMA_CPP}, by which llama.cpp knows the template of Gemma 4"
        return [Finding(where, what, "it hands out calls as text, or in a format of its own", NEWER, level)]
    if CURRENT_TO_LLAMA_CPP not in template:
        what = f"has no {CURRENT_TO_LLAMA_CPP!r}, by which llama.cpp knows a current template"
        why = (
            "it takes it for an old one and rewrites the results of tools before it renders them: JSON in them is read"
        )
        return [Finding(where, what, why, "keep the comments of the template as they are", "note")]
    return []
