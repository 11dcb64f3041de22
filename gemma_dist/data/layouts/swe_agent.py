"""SWE-agent: the `history` of a `.traj` file, and the trajectories that Nebius published.

    {"environment": "swe_main", "trajectory": [{"action": ..., "observation": ..., "thought": ...}], "info": {...},
     "history": [{"role": "system", "content": "...", "agent": "main", "message_type": "system_prompt"},
       {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "ls", "tool_calls": [...]},
       {"role": "tool", "content": "a.py", "tool_call_ids": ["c1"], "message_type": "observation"}]}
    {"instance_id": ..., "trajectory": [{"role": "system", "system_prompt": "...", "text": null, "mask": false},
       {"role": "user", "text": "..."}, {"role": "ai", "text": "I look.\\n```\\nls\\n```"}]}

Calls that SWE-agent's text formats write into a code block stay text, as the model was asked to write them.
"""

from gemma_dist.data import marks
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

NEBIUS_ROLES = {"system": "system", "user": "user", "ai": "assistant"}
CARRIED = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", *marks.ON_MESSAGE)
DEMONSTRATIONS = "messages of a demonstration are shown, not trained"


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages is Nebius', or one of SWE-agent's with the marks of its history."""
    return any(_is_nebius(message) or _is_marked(message) for message in messages)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape. DataError where one cannot be converted."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        with error_context(turn_name(number, get(message, "role"))):
            if _is_nebius(message):
                row.messages.append((number, _nebius_message(message)))
            elif isinstance(message, dict):
                row.messages.append((number, _message(row, message)))
            else:
                raise DataError(f"the message is {short(message)}; write an object with role and content")
    return row


def _is_nebius(message: object) -> bool:
    has_text = get(message, "text") is not None or get(message, "system_prompt") is not None
    return get(message, "role") in NEBIUS_ROLES and get(message, "content") is None and has_text


def _is_marked(message: object) -> bool:
    return get(message, "agent") is not None and get(message, "role") is not None


def _nebius_message(message: object) -> RawRow:
    assert isinstance(message, dict)
    if message.get("mask"):
        raise DataError("`mask` is true, which does not say who is masked; write train: false, or false")
    role = NEBIUS_ROLES[message["role"]]
    text = message.get("system_prompt") if role == "system" else message.get("text")
    return {"role": role, "content": text or message.get("text")}


def _message(row: OpenAIRow, message: RawRow) -> RawRow:
    moved = {key: message[key] for key in CARRIED if message.get(key) is not None}
    ids = message.get("tool_call_ids")
    if message.get("role") == "tool" and isinstance(ids, list) and ids:
        if len(ids) > 1:
            raise DataError(f"answers the calls {short(ids)} at once; write a message for each call")
        moved["tool_call_id"] = ids[0]
    if message.get("is_demo"):
        row.notes[DEMONSTRATIONS] += 1
        if message.get("role") == "assistant":
            moved["train"] = False
    thoughts = message.get("thinking_blocks")
    texts = [get(block, "thinking") for block in thoughts] if isinstance(thoughts, list) else []
    reasoning = [text for text in texts if isinstance(text, str) and text]
    if reasoning:
        moved.setdefault("reasoning_content", "\n".join(reasoning))
    return moved
