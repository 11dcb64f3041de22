"""A prefilled answer: the request ends with its beginning, written for the model, and the response only goes on.

    {"messages": [{"role": "user", ...}, {"role": "assistant", "content": "{"}]}, {"content": [text block '"a": 1}']}
      -> [{"role": "user", ...}, {"role": "assistant", "content": [text block '{"a": 1}']}]

So do Anthropic and Bedrock, whose answers are blocks, and APIs that mark the beginning: {"prefix": true} of DeepSeek
and Mistral, {"partial": true} of Kimi and Qwen. Elsewhere an answer behind an assistant's message is a new message.
"""

from collections import Counter

from gemma_dist.data import marks
from gemma_dist.data.strict import get, get_list
from gemma_dist.data.types import RawRow

PREFILLED = "answers that go on from a beginning in their request were joined to it"
MARKS = ("prefix", "partial")


def continued(given: list[object], answers: list[object], notes: Counter[str]) -> list[object]:
    """The messages of a request and its response in one list; a beginning and what goes on from it are one message."""
    before = given[-1] if given else None
    answer = answers[0]
    beginning, said = _text_of(before), _opening_text(answer)
    is_marked = any(get(before, key) is True for key in MARKS)
    if not isinstance(before, dict) or not isinstance(answer, dict) or not beginning or not said:
        return given + answers
    has_blocks = isinstance(answer.get("content"), list)
    if not (is_marked or has_blocks) or marks.is_trained(before) != marks.is_trained(answer):
        return given + answers
    repeats = is_marked and said.startswith(beginning)  # Mistral's answers do
    whole = said if repeats else beginning + said
    notes[PREFILLED] += 1
    return [*given[:-1], _with_opening(answer, whole), *answers[1:]]


def _text_of(message: object) -> str:
    """The text of an assistant's message that holds nothing else; "" of others."""
    if get(message, "role") != "assistant" or get(message, "tool_calls") or get(message, "function_call"):
        return ""
    content = get(message, "content")
    blocks = [content] if isinstance(content, str) else get_list(message, "content")
    texts = [_block_text(block) for block in blocks]
    return "".join(texts) if all(texts) else ""


def _opening_text(message: object) -> str:
    """The text with which an assistant's message begins; "" where it begins with something else."""
    content = get(message, "content")
    blocks = [content] if isinstance(content, str) else get_list(message, "content")
    is_assistant = get(message, "role") == "assistant"
    return _block_text(blocks[0]) if is_assistant and blocks else ""


def _block_text(block: object) -> str:
    """The text of a string, of Anthropic's {"type": "text", "text": "{"} or Bedrock's {"text": "{"}; "" of others."""
    if isinstance(block, str):
        return block
    text = get(block, "text")
    return text if isinstance(text, str) and get(block, "type") in ("text", None) else ""


def _with_opening(message: RawRow, text: str) -> RawRow:
    """The message with another text where its first one stood."""
    content = message["content"]
    if not isinstance(content, list):
        return {**message, "content": text}
    first = {**content[0], "text": text} if isinstance(content[0], dict) else text
    return {**message, "content": [first, *content[1:]]}
