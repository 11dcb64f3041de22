"""Calls that a row's messages write as text, in the syntax of another model: into `tool_calls` and their answers.

    {"role": "assistant", "content": "I look.\\n<tool_call>\\n{'name': 'f', 'arguments': {'a': 1}}\\n</tool_call>"}
    {"role": "user", "content": "<tool_response>\\n{'name': 'f', 'content': 20}\\n</tool_response>"}

Only what can be nothing else is converted: calls at the end of a message, with text before them or none. Where tools
are declared, anything else that attempts a call is refused: trained as it is, it would teach the wrong syntax. Words
about such a syntax are words: inside backticks, or without tools and with text around.
"""

import re
from collections import Counter
from typing import TypeAlias

from gemma_dist.data.layouts.call_bare import WrittenCalls
from gemma_dist.data.layouts.call_marks import find_calls
from gemma_dist.data.layouts.call_syntax import Signatures, signatures_of
from gemma_dist.data.layouts.system_text import find_listing, without_instructions, without_listing
from gemma_dist.data.layouts.text_results import TextResult, holds_result, match_results, read_results
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, first_filled, turn_name
from gemma_dist.data.marks import is_trained
from gemma_dist.data.strict import as_list, as_object, error_context, get, short, without
from gemma_dist.data.tool_forms import to_openai_tools
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# "Sure. [f(a=1)]": at the end of a text.
_LIKE_A_CALL = re.compile(r"\[[^\W\d][\w.]*+\(\s*+(?:\)|[^\W\d]\w*+\s*+=[^=])")
_UNDECLARED = "assistant texts that end like a call, [name(argument=value)], of a tool that is not declared were kept"
# Messages that hold results, with their turns.
Results: TypeAlias = list[tuple[int, RawRow]]


def convert_text_calls(row: OpenAIRow) -> OpenAIRow:
    """The row with calls, results and declarations that it wrote as text where the OpenAI shape has them.

    Raises:
        DataError: a message attempts a call as text that cannot be converted.
    """
    if not row.messages:
        return row
    tools, notes = row.tools, row.notes.copy()
    system = _system_text(row.messages)
    with error_context(turn_name(row.messages[0][0], "system")):
        listing = find_listing(system)
    declared, signatures = tools, signatures_of(tools)
    if listing and not signatures:
        declared, signatures = listing.tools, signatures_of(listing.tools)
    messages, styles = _convert_messages(row.messages, signatures)
    if signatures:
        num_like_calls = sum(_ends_like_a_call(message) for _, message in messages)
        if num_like_calls:
            notes[_UNDECLARED] += num_like_calls
    for style in sorted(styles):
        notes[f"rows with calls written as text ({style}) were converted"] += 1
    if listing and (listing.is_announced or styles):
        if declared is tools:
            with error_context(turn_name(row.messages[0][0], "system")):
                _refuse_other_tools(listing.tools, tools)
        messages = _with_system(messages, without_listing(system, listing))
        if declared is tools:
            notes["rows whose system text listed tools beside `tools`: the list was removed"] += 1
        else:
            notes["rows whose system text listed their tools: the list was moved to `tools`"] += 1
            tools = declared
    elif styles and without_instructions(system) != system.strip():
        messages = _with_system(messages, without_instructions(system))
        notes["rows whose system text asked for another call syntax: the request was removed"] += 1
    return OpenAIRow(messages, tools, row.images, row.has_system, notes)


# ---- the system message ----------------------------------------------------------------------------------------------


def _system_text(messages: NumberedMessages) -> str:
    """What the first message says, if it is a system's."""
    _, first = messages[0]
    return (_text(first) or "") if get(first, "role") in ("system", "developer") else ""


def _refuse_other_tools(listed: list[object], declared: object) -> None:
    """DataError where a list of declarations in the system text is not that of `tools`, which is to stay alone."""
    given = _functions(declared)
    found = _functions(to_openai_tools(listed, Counter()))
    differing = sorted(name for name in given.keys() | found.keys() if given.get(name) != found.get(name))
    if differing:
        raise DataError(
            f"the text lists other tools than `tools` declares; they differ in {', '.join(differing[:5])}: keep one of "
            "the two lists, or make them equal"
        )


def _functions(tools: object) -> dict[str, object]:
    """What each tool is declared as, by its name, without the nulls that Arrow fills in."""
    functions = [as_object(get(tool, "function") or tool) for tool in as_list(tools)]
    return {str(function.get("name")): _without_nulls(function) for function in functions}


def _without_nulls(value: object) -> object:
    """A JSON value without the keys whose value is null, at any depth."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _with_system(messages: NumberedMessages, text: str) -> NumberedMessages:
    """The messages with another system text; without a system message where nothing is left to say."""
    (number, system), *others = messages
    assert isinstance(system, dict)
    return [(number, {**system, "content": text}), *others] if text else others


def _text(message: object) -> str | None:
    """The text of a message; None where it holds anything else."""
    content = get(message, "content")
    if isinstance(content, str):
        return content
    said = ""
    for part in content if isinstance(content, list) else [None]:
        text = get(part, "text")
        if get(part, "type") != "text" or not isinstance(text, str):
            return None
        said += text
    return said


# ---- calls and results -----------------------------------------------------------------------------------------------


def _convert_messages(messages: NumberedMessages, signatures: Signatures) -> tuple[NumberedMessages, set[str]]:
    """The messages with calls and results in OpenAI's form, and in whose syntax calls were written."""
    converted: NumberedMessages = []
    styles: set[str] = set()
    waiting: list[str] = []  # the tools that the last message called in its text
    results: Results = []  # of these calls
    followers = [message for _, message in messages[1:]] + [None]
    for (number, message), follower in zip(messages, followers, strict=True):
        if waiting and isinstance(message, dict) and holds_result(message):
            results.append((number, message))
            continue
        converted += _answers(results, waiting)
        results, waiting = [], []
        is_users_result = get(message, "role") == "user" and holds_result(message)
        is_behind_answer = (
            bool(converted) and get(converted[-1][1], "role") == "assistant"
        )  # else a log that was pasted
        if signatures and is_users_result and is_behind_answer:
            place = turn_name(number, "user")
            raise DataError(f"{place}: is a tool's result as text, but no call waits for one; write the call before it")
        written = _written_calls(number, message, follower, signatures)
        if written and isinstance(message, dict):
            styles.add(written.style)
            waiting = _called(written.calls)
            message = {**message, "content": written.before, "tool_calls": written.calls}
        elif get(follower, "role") == "user":
            waiting = _called(get(message, "tool_calls"))  # whose results may be text
        converted.append((number, message))
    return converted + _answers(results, waiting), styles


def _written_calls(number: int, message: object, follower: object, signatures: Signatures) -> WrittenCalls | None:
    """The calls that an assistant's message writes as text; None where it writes none.

    Raises:
        DataError: it attempts one that cannot be converted, and is trained.
    """
    text = _text(message)
    if get(message, "role") != "assistant" or not text:
        return None
    is_structured = bool(first_filled(message, "tool_calls", "function_call"))
    is_answered = holds_result(follower) and not is_structured
    with error_context(turn_name(number, "assistant")):
        try:
            written = find_calls(
                text,
                signatures,
                is_answered=is_answered,
                is_asked_on=get(follower, "role") == "user" and not is_answered and not is_structured,
                is_last=follower is None,
            )
        except DataError:
            if isinstance(message, dict) and is_trained(message):
                raise
            return None
        if written and is_structured:
            raise DataError(
                f"holds `tool_calls` and writes a call as text, too, in the style of {written.style}; "
                "remove the text of the call"
            )
    return written


def _ends_like_a_call(message: object) -> bool:
    """Whether an assistant's message ends in what would be a call, were its tool declared: "Sure. [f(a=1)]"."""
    text = (_text(message) or "").rstrip()
    is_assistant = get(message, "role") == "assistant"
    return is_assistant and text.endswith(")]") and bool(_LIKE_A_CALL.search(text))


def _called(calls: object) -> list[str]:
    """The names of the tools that are called."""
    names = [get(get(call, "function") or call, "name") for call in as_list(calls)]
    return [name for name in names if isinstance(name, str)]


def _answers(results: Results, waiting: list[str]) -> NumberedMessages:
    """The results, each as the tool message of a call, and what a user says behind the last one."""
    if not results:
        return []
    found: list[TextResult] = []
    turns: Results = []  # of the results in `found`
    said = ""
    for number, message in results:
        with error_context(turn_name(number, get(message, "role"))):
            if said:
                raise DataError("holds a result behind what the user said; move the results in front")
            in_message, said = read_results(message, waiting, len(waiting))
        found += in_message
        turns += [(number, message)] * len(in_message)
    number, last = results[-1]
    with error_context(turn_name(number, get(last, "role"))):
        if said.strip() and get(last, "role") != "user":
            raise DataError(
                f"holds {short(said.strip())} behind the tool's result; write it inside of the result, or as a "
                "user's message of its own"
            )
        answers = match_results(found, waiting)
    numbered: NumberedMessages = []
    for (number, message), answer in zip(turns, answers, strict=True):
        numbered.append((number, {**without(message, "tool_call_id"), **answer}))
    if said.strip():
        numbered.append((number, {**last, "content": said.strip()}))
    return numbered
