"""glaive-function-calling: a whole conversation as one text.

    {"system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -{…}",
     "chat": "USER: Rome?\\n\\n\\nASSISTANT: <functioncall> {…} <|endoftext|>\\n\\n\\nFUNCTION RESPONSE: {…}\\n\\n\\n…"}

The calls, results and declarations in it are converted with those of other rows that write them as text.
"""

import re

from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow
from gemma_dist.data.strict import short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

SYSTEM = "SYSTEM: "  # how the text in `system` begins
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")


def is_layout(row: RawRow) -> bool:
    """Whether the row holds its conversation as the text `chat`."""
    return isinstance(row.get("chat"), str) and not (row.get("messages") or row.get("conversations"))


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where the text does not say who speaks first."""
    chat = row["chat"]
    assert isinstance(chat, str)
    speakers = list(_SPEAKER.finditer(chat))
    if not speakers or chat[: speakers[0].start()].strip():
        raise DataError(f"`chat` is {short(chat)}; it opens with `USER:` and says who speaks, or write `messages`")
    ends = [speaker.start() for speaker in speakers[1:]] + [len(chat)]
    messages: NumberedMessages = []
    for number, (speaker, end) in enumerate(zip(speakers, ends, strict=True), start=1):
        said = chat[speaker.end() : end].replace("<|endoftext|>", "").strip()
        messages.append((number, {"role": _ROLES[speaker[1]], "content": said}))
    return OpenAIRow(messages, row.get("tools"))
