"""Claude Code: a session is a list of events, of which those of type `user` and `assistant` hold a message.

    {"id": ..., "events": [
      {"type": "user", "uuid": "u1", "parentUuid": null, "sessionId": "s", "message": {"role": "user", "content": "."}},
      {"type": "assistant", "uuid": "u2", "parentUuid": "u1", "isSidechain": false, "message": {"id": "msg_1",
        "role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Bash", "input": {...}}]}},
      {"type": "user", "uuid": "u3", "parentUuid": "u2", "message": {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": "ok", "is_error": false}]}, "toolUseResult": {...}}]}

Each block of an answer is logged as an event of its own under the `message.id` of the answer: they are one message.
A transcript has one event a line; SESSION_COMMAND makes a row of each session.
"""

from collections import Counter
from typing import TypeAlias

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts import anthropic
from gemma_dist.data.layouts.pieces import ENCRYPTED_REASONING, tidy
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, first_filled
from gemma_dist.data.strict import get, get_list
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

SESSION_COMMAND = (
    "jq -cs 'map(select(.sessionId // .session_id)) | group_by(.sessionId // .session_id)[] "
    "| {id: (.[0].sessionId // .[0].session_id), events: .}' SESSION.jsonl"
)
COMPACTED_COMMAND = (
    'jq -c \'. as $row | ([-1] + [.events | to_entries[] | select(.value.subtype == "compact_boundary").key] '
    "+ [.events | length]) as $cuts | range($cuts | length - 1) "
    '| {id: "\\($row.id)-\\(.)", events: $row.events[$cuts[.] + 1:$cuts[. + 1]]}\' FILE'
)
# Events with their numbers in the session, from 1.
Events: TypeAlias = list[tuple[int, RawRow]]

EVENT_TYPES = ("user", "assistant")
OTHER_EVENTS = "events without a message (summary, system, snapshot) were left out"
SIDECHAINS = "messages of subagents (isSidechain) were left out"
META = "messages of Claude Code itself (isMeta, API errors) were left out"
BRANCHES = "messages of abandoned branches were left out"


def is_event(row: object) -> bool:
    """Whether an object is an event of a transcript, or of what `claude -p --output-format stream-json` prints."""
    if get(row, "type") == "summary":
        return get(row, "leafUuid") is not None
    if first_of(row, ("sessionId", "session_id")) is not None:
        return isinstance(get(row, "type"), str)
    return get(row, "uuid") is not None and _holds_message(row)


def is_messages(events: list[object]) -> bool:
    """Whether one of the events is Claude Code's and holds a message."""
    return any(_holds_message(event) and get(event, "role") is None for event in events)


def to_openai(events: list[object]) -> OpenAIRow:
    """The messages of a session's last branch. DataError where the session cannot be one trajectory."""
    notes: Counter[str] = Counter()
    kept = _on_last_branch(_of_main_agent(events, notes), notes)
    turns = _merge_answers(kept, notes)
    return OpenAIRow(tidy(anthropic.to_messages(turns, notes)), notes=notes)


def _holds_message(event: object) -> bool:
    """Whether an event is {"type": "user", "message": {...}}, or an assistant's."""
    return get(event, "type") in EVENT_TYPES and isinstance(get(event, "message"), dict)


def _is_sidechain(event: object) -> bool:
    """Whether a subagent said it: `isSidechain` of transcripts, `parent_tool_use_id` of `stream-json`."""
    return bool(get(event, "isSidechain")) or get(event, "parent_tool_use_id") is not None


def _of_main_agent(events: list[object], notes: Counter[str]) -> Events:
    """The numbered events of the session itself; a file that holds nothing but a subagent's events is that agent's."""
    is_session = any(_holds_message(event) and not _is_sidechain(event) for event in events)
    kept: Events = []
    has_message = False
    for number, event in enumerate(events, start=1):
        if is_session and _is_sidechain(event):
            notes[SIDECHAINS] += 1
            continue
        if has_message and get(event, "subtype") == "compact_boundary":
            raise DataError(
                f"event {number} compacts the session: what follows was said under a summary of what is before; "
                f"make rows of what lies between such events: {COMPACTED_COMMAND}"
            )
        has_message = has_message or _holds_message(event)
        if isinstance(event, dict):
            kept.append((number, event))
    return kept


def _on_last_branch(events: Events, notes: Counter[str]) -> Events:
    """The events with messages that lead to the last one, each following its `parentUuid`.

    A user who goes back opens a branch. Parallel calls are none, though the events of their answers fork from theirs:
    the blocks of one answer, and the results of its calls, stay together.
    """
    branch = _last_branch([event for _, event in events])
    answers = {_answer_id(events[index][1]) for index in branch} - {None}
    calls: set[object] = set()
    for _, event in events:
        if _answer_id(event) in answers:
            calls |= _ids(event, "tool_use", "id")
    kept: Events = []
    for index, (number, event) in enumerate(events):
        results = _ids(event, "tool_result", "tool_use_id")
        is_of_branch = index in branch or _answer_id(event) in answers
        if not _holds_message(event):
            notes[OTHER_EVENTS] += 1
        elif _is_meta(event):
            notes[META] += 1
        elif is_of_branch or (results and results <= calls):
            kept.append((number, event))
        else:
            notes[BRANCHES] += 1
    return kept


def _last_branch(events: list[RawRow]) -> set[int]:
    """The indices of the events on the way from the last message to its beginning."""
    index_of = {event["uuid"]: index for index, event in enumerate(events) if _id(event, "uuid")}
    branch: set[int] = set()
    index = max((index for index, event in enumerate(events) if _holds_message(event)), default=-1)
    while index >= 0 and index not in branch:
        branch.add(index)
        event = events[index]
        if event.get("parentUuid") is None and "parentUuid" in event:
            break
        # Where the parent is not in the file, or is not named: the event before.
        index = index_of.get(_id(event, "parentUuid"), index - 1)
    return branch


def _is_meta(event: RawRow) -> bool:
    """Whether the program itself wrote the message: a caveat about a command, or an error in place of an answer."""
    is_made_up = get(event["message"], "model") == "<synthetic>"
    return is_made_up or bool(first_filled(event, "isMeta", "isApiErrorMessage"))


def _answer_id(event: RawRow) -> object:
    """The id of the answer of the API that an assistant's event is a block of."""
    return _id(event.get("message"), "id") if event.get("type") == "assistant" else None


def _id(value: object, key: str) -> str | None:
    """An id; None where there is none, or it is no text."""
    found = get(value, key)
    return found if isinstance(found, str) else None


def _blocks(event: RawRow) -> list[object]:
    """The blocks of an event's message; none where it is a string alone."""
    return get_list(event.get("message"), "content")


def _ids(event: RawRow, kind: str, key: str) -> set[object]:
    """The ids of the blocks of one kind: {"t1"} of [{"type": "tool_use", "id": "t1", ...}]."""
    return {_id(block, key) for block in _blocks(event) if get(block, "type") == kind}


def _merge_answers(events: Events, notes: Counter[str]) -> NumberedMessages:
    """Messages with Anthropic's blocks: the events of one answer as one message, where its first one stands.

    [{"type": "assistant", "message": {"id": "m", "content": [A]}}, {..., "message": {"id": "m", "content": [B]}}]
      -> [{"role": "assistant", "content": [A, B]}]
    """
    turns: NumberedMessages = []
    content_of: dict[object, list[object]] = {}
    for number, event in events:
        content = get(event["message"], "content")
        answer_id = _answer_id(event)
        if event["type"] == "user":
            turns.append((number, {"role": "user", "content": content}))
            continue
        blocks = _readable(_blocks(event), notes)
        if isinstance(content, str):
            blocks = [{"type": "text", "text": content}]
        if answer_id is not None and answer_id in content_of:
            content_of[answer_id] += blocks
        else:
            content_of[answer_id] = blocks
            turns.append((number, {"role": "assistant", "content": blocks}))
    empty = {"role": "assistant", "content": []}  # all of it was encrypted
    return [(number, turn) for number, turn in turns if turn != empty]


def _readable(blocks: list[object], notes: Counter[str]) -> list[object]:
    """The blocks without the thinking that is encrypted, or is there by its signature alone."""
    readable: list[object] = []
    for block in blocks:
        is_thinking = get(block, "type") in ("thinking", "redacted_thinking")
        if is_thinking and not get(block, "thinking"):
            notes[ENCRYPTED_REASONING] += 1
        else:
            readable.append(block)
    return readable
