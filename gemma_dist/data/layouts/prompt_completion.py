"""TRL's prompt and completion as lists of messages; preference rows and plain texts are refused with the way out.

    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}

TRL trains the completion alone, so the assistant's messages of the prompt are shown and not trained.
"""

from gemma_dist.data.layouts.dialects import is_chat, is_message, read_messages
from gemma_dist.data.layouts.ratings import find_preference, refuse_label
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import as_list, as_object, get, read_json_text, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

PREFERRED_COMMAND = "jq -c '{messages: (.input.messages + .preferred_output), tools: .input.tools}' FILE"
CHOSEN_TEXT_COMMAND = (
    'jq -c \'{messages: [{role: "user", content: .prompt}, {role: "assistant", content: .chosen}]}\' FILE'
)
ASKED = ("prompt", "instruction", "question", "query", "input")  # what is asked, as a text beside two answers
PLAIN_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("inputs", "outputs"),
    ("inputs", "targets"),
)
SHOWN = "assistant messages of the prompt are shown, not trained"
PREFERENCE_COMMAND = (
    "jq -c '{messages: ((if (.prompt | type) == \"array\" then .prompt else [] end) + .chosen), tools}' FILE"
)


def is_layout(row: RawRow) -> bool:
    """Whether the row has no messages, but a prompt, a preference, or two plain texts."""
    if row.get("messages") or row.get("conversations"):
        return False
    has_prompt = row.get("prompt") is not None and not isinstance(row["prompt"], dict)
    return has_prompt or _is_preference(row) or _plain_pair(row) is not None


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where it is no chat, or says that one answer is better than another."""
    if _is_preference(row):
        raise _one_of_two(row)
    refuse_label(row)
    pair = _plain_pair(row)
    if pair is not None:
        raise _refusal(row, *pair)
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    read = read_messages(prompt + completion, row)
    for index, (number, message) in enumerate(read.messages):
        if number <= len(prompt) and get(message, "role") == "assistant":
            read.messages[index] = (number, {**as_object(message), "train": False})
            read.notes[SHOWN] += 1
    return read


def _is_preference(row: RawRow) -> bool:
    """Whether the row holds a better and a worse answer: {"prompt": ..., "chosen": ..., "rejected": ...}."""
    found = find_preference(row)
    return found is not None and found.better != ""


def _one_of_two(row: RawRow) -> DataError:
    """Why a preference is no trajectory, with the command that keeps the better answer."""
    found = find_preference(row)
    assert found is not None
    names = f"`{found.better}` and `{found.worse}`"
    if found.better == "preferred_output":
        command = PREFERRED_COMMAND
    elif isinstance(row[found.better], str):
        names = f"the texts {names}"
        asked = next((key for key in ASKED if isinstance(row.get(key), str)), "prompt")
        command = CHOSEN_TEXT_COMMAND.replace(".prompt", _question(row, asked))
    else:
        command = PREFERENCE_COMMAND
    return DataError(
        f"the row holds {names} (a preference), and one trajectory is trained; keep the better one: "
        f"{command.replace('.chosen', f'.{found.better}')}"
    )


def _plain_pair(row: RawRow) -> tuple[str, str] | None:
    """The columns that hold a text and what followed it, where there are such."""
    for asked, answered in PLAIN_PAIRS:
        given, answer = row.get(asked), row.get(answered)
        if isinstance(given, str) and answer is not None and not is_chat(_json(given)):
            return asked, answered
    return None


def _json(text: object) -> object:
    """The value of a text that is JSON of a list; other texts and values as they are."""
    if not isinstance(text, str) or not text.startswith("["):
        return text
    try:
        return read_json_text(text, "prompt")
    except DataError:
        return text


def _messages(row: RawRow, key: str) -> list[object]:
    """The messages of a column: a list, its JSON text, one message, or the text of the assistant's only answer."""
    value = _json(row.get(key))
    if key == "completion" and isinstance(value, str) and value.strip():
        return [{"role": "assistant", "content": value}]
    if is_message(value):
        return [value]
    if is_chat(value):
        return as_list(value)
    raise DataError(
        f"`{key}` is {short(value)}; write a list of messages: "
        '{"prompt": [{"role": "user", "content": ...}], "completion": [{"role": "assistant", "content": ...}]}'
    )


def _refusal(row: RawRow, asked: str, answered: str) -> DataError:
    """Why two texts are no trajectory, with the command that makes one of them."""
    messages = f'[{{role: "user", content: {_question(row, asked)}}}, {{role: "assistant", content: .{answered}}}]'
    if row.get("history"):
        messages = (
            f'([.history[] | {{role: "user", content: .[0]}}, {{role: "assistant", content: .[1]}}] + {messages})'
        )
    beside = "".join(f"{key}, " for key in ("system", "tools") if row.get(key))
    return DataError(
        f"`{asked}` is the plain text {short(row[asked])}, which does not say who speaks; if it is what a user says "
        f"and `{answered}` what the model answers, write so: jq -c '{{{beside}messages: {messages}}}' FILE"
    )


def _question(row: RawRow, asked: str) -> str:
    """What is asked, as an expression of jq: a column, or Alpaca's two."""
    if asked == "instruction" and row.get("input"):
        return '([.instruction, .input] | map(select(. // "" != "")) | join("\\n"))'
    return f".{asked}"
