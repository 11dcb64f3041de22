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
from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.turns import OpenAIRow, first_filled, turn_name
from gemma_dist.data.strict import error_context, get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

NEBIUS_ROLES = {"system": "system", "user": "user", "ai": "assistant"}
CARRIED = (
    "role",
    "content",
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    *marks.ON_MESSAGE,
    *marks.OFF_MESSAGE,
)
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
    """Whether a message is {"role": "ai", "text": "..."}, and has no `content`."""
    has_text = first_of(message, ("text", "system_prompt")) is not None
    return has_text and get(message, "content") is None and get(message, "role") in tuple(NEBIUS_ROLES)


def _is_marked(message: object) -> bool:
    """Whether a message names the agent that it belongs to: {"role": "user", "content": "...", "agent": "main"}."""
    return get(message, "agent") is not None and get(message, "role") is not None


def _nebius_message(message: object) -> RawRow:
    """{"role": "ai", "text": "I look.", "mask": false} -> {"role": "assistant", "content": "I look."}"""
    if get(message, "mask"):
        raise DataError("`mask` is true, which does not say who is masked; write train: false, or false")
    role = NEBIUS_ROLES[get(message, "role")]
    keys = ("system_prompt", "text") if role == "system" else ("text",)
    return {"role": role, "content": first_filled(message, *keys)}


def _message(row: OpenAIRow, message: RawRow) -> RawRow:
    """A message of a history with the keys that OpenAI's have.

    {"role": "tool", "content": "a.py", "tool_call_ids": ["c1"], "agent": "main", "message_type": "observation"}
      -> {"role": "tool", "content": "a.py", "tool_call_id": "c1"}
    """
    role = message.get("role")
    moved = {key: message[key] for key in CARRIED if message.get(key) is not None}
    ids = get_list(message, "tool_call_ids") if role == "tool" else []
    if len(ids) > 1:
        raise DataError(f"answers the calls {short(ids)} at once; write a message for each call")
    if ids:
        moved["tool_call_id"] = ids[0]
    if message.get("is_demo"):
        row.notes[DEMONSTRATIONS] += 1
        if role == "assistant":
            moved["train"] = False
    reasoning = []
    for block in get_list(message, "thinking_blocks"):
        text = get(block, "thinking")
        if isinstance(text, str) and text:
            reasoning.append(text)
    if reasoning:
        moved.setdefault("reasoning_content", "\n".join(reasoning))
    return moved
