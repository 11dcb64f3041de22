"""TRL's prompt and completion as lists of messages; preference rows and plain texts are refused with the way out.

    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}

TRL trains the completion alone, so the assistant's messages of the prompt are shown and not trained.
"""

from gemma_dist.data.layouts.dialects import is_chat, is_message, read_messages
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import as_list, as_object, get, read_json_text, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

PREFERRED_COMMAND = "jq -c '{messages: (.input.messages + .preferred_output), tools: .input.tools}' FILE"
CHOSEN_TEXT_COMMAND = (
    'jq -c \'{messages: [{role: "user", content: .prompt}, {role: "assistant", content: .chosen}]}\' FILE'
)
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
PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
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
    if isinstance(row.get("label"), bool):
        raise DataError(
            f"`label` is {row['label']}: the row rates an answer (KTO), and every row is trained; keep the good ones: "
            "jq -c 'select(.label) | {messages: (.prompt + .completion), tools}' FILE"
        )
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
    return any(row.get(good) is not None and row.get(bad) is not None for good, bad in PREFERENCES)


def _one_of_two(row: RawRow) -> DataError:
    """Why a preference is no trajectory, with the command that keeps the better answer."""
    if row.get("preferred_output") is not None:
        names, command = "`preferred_output` and `non_preferred_output`", PREFERRED_COMMAND
    elif isinstance(row["chosen"], str):
        names, command = "the texts `chosen` and `rejected`", CHOSEN_TEXT_COMMAND
    else:
        names, command = "`chosen` and `rejected`", PREFERENCE_COMMAND
    return DataError(
        f"the row holds {names} (a preference), and one trajectory is trained; keep the better one: {command}"
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
    question = f".{asked}"
    if asked == "instruction" and row.get("input"):
        question = '([.instruction, .input] | map(select(. // "" != "")) | join("\\n"))'
    messages = f'[{{role: "user", content: {question}}}, {{role: "assistant", content: .{answered}}}]'
    if row.get("history"):
        messages = (
            f'([.history[] | {{role: "user", content: .[0]}}, {{role: "assistant", content: .[1]}}] + {messages})'
        )
    beside = "".join(f"{key}, " for key in ("system", "tools") if row.get(key))
    return DataError(
        f"`{asked}` is the plain text {short(row[asked])}, which does not say who speaks; if it is what a user says "
        f"and `{answered}` what the model answers, write so: jq -c '{{{beside}messages: {messages}}}' FILE"
    )
