"""Declarations of tools, wherever a row holds them, as one list in OpenAI's form.

    {"tools": [{…}, …], "messages": […]}
    {"functions": [{…}, …], "messages": […]}                                            OpenAI until 2023
    {"available_tools": [{…}, …], "messages": […]}                                      Toucan
    {"chat_template_kwargs": {"tools": [{…}, …]}, "messages": […]}                      vLLM, TRL
    {"messages": [{"role": "system", "content": "…", "tools": [{…}, …]}, …]}            GLM

Several that say the same are one; several that do not are refused. How each declaration may look: `tool_forms.py`.
"""

import json
import re
from collections import Counter

from gemma_dist.data.layouts.turns import NumberedMessages, number_turns, turn_name
from gemma_dist.data.strict import (
    as_list,
    as_object,
    error_context,
    get,
    get_list,
    is_json_text,
    is_list_of,
    short,
    without,
)
from gemma_dist.data.tool_forms import declared_tools, decode_tools, foreign_names, to_openai_tools
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

COLUMNS = ("tools", "functions", "available_tools")
NO_DECLARATIONS = ("tool_choice", "tool_config", "toolConfig")  # of a request: they name a tool at most
SUSPICIOUS = re.compile(r"tool|function|(?<![a-z])apis?(?![a-z])|(?<![a-z])mcp(?![a-z])")  # in a column's name
CALLS = re.compile("call|result|response")  # in the name of a column that is about calls


def find_declarations(row: RawRow, tools: object, messages: NumberedMessages, notes: Counter[str]) -> object:
    """The row's declarations as a list in OpenAI's form; what is none stays as it is, to be refused with the rest.

    Args:
        tools: what the layout found; most often the column `tools`.
        messages: as the layout converted them.
        notes: get a count of what was left out.

    Raises:
        DataError: two places declare different tools; a column looks like declarations and is not one that is read.
    """
    declared: dict[str, object] = {}
    for place, value in _places(row, tools, messages).items():
        with error_context(f"`{place}`"):
            declared[place] = to_openai_tools(decode_tools(value), notes)
    declared = {place: found for place, found in declared.items() if found}
    first, *others = declared or ["tools"]
    for other in others:
        if _canonical(declared[other]) != _canonical(declared[first]):
            raise DataError(f"`{first}` and `{other}` declare different tools; keep one of the two")
    _refuse_unread(row, declared.get(first))
    return declared.get(first)


def _places(row: RawRow, tools: object, messages: NumberedMessages) -> dict[str, object]:
    """What each place of a row that may hold declarations says, by its name in errors; those that say something."""
    given = {
        "tools": tools or row.get("tools"),
        "functions": row.get("functions"),
        "available_tools": _unless_names(row.get("available_tools")),
        "chat_template_kwargs.tools": get(row.get("chat_template_kwargs"), "tools"),
        "tools of the system message": _of_system_message(row, messages),
    }
    return {place: value for place, value in given.items() if value}


def _of_system_message(row: RawRow, messages: NumberedMessages) -> object:
    """The declarations of {"role": "system", "content": "…", "tools": […]}; None where there are none.

    Raises:
        DataError: another message has some.
    """
    found = None
    raw_turns = [] if row.get("messages") else get_list(row, "conversations")
    for number, turn in [*messages, *number_turns(raw_turns)]:
        tools = get(turn, "tools")
        if not tools:
            continue
        role = get(turn, "role") or get(turn, "from")
        if number > 1 or role not in ("system", "developer"):
            raise DataError(
                f"{turn_name(number, role)}: `tools` of a message that is not the first system message; declare "
                "all tools in the row's `tools`"
            )
        found = tools
    return found


def without_tools(message: object) -> object:
    """A message without the declarations that it brought."""
    given = as_object(message)
    return without(given, "tools") if "tools" in given else message


def _unless_names(value: object) -> object:
    """A column of declarations; None where it only names tools, as test cases of tutorials do: ["weather", "clock"]."""
    if isinstance(value, str) and not is_json_text(value):
        return None
    with error_context("`available_tools`"):
        decoded = decode_tools(value)
    return None if is_list_of(decoded, str) else decoded


def _refuse_unread(row: RawRow, found: object) -> None:
    """Refuse a column that declares other tools than those that were found, under a name that is not read."""
    names = [get(get(tool, "function"), "name") for tool in as_list(found)]
    for column, value in row.items():
        if not _sounds_like_tools(str(column)):
            continue
        declared = declared_tools(value)
        if declared is not None and _canonical(declared) != _canonical(found):
            raise DataError(f"the column `{column}` declares tools, but is not read; rename it to `tools`")
        unread = [name for name in foreign_names(value) if name not in names]
        if unread:
            raise DataError(
                f"the column `{column}` declares {short(unread)} in a form that is not read; write as `tools`: "
                '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]'
            )


def _sounds_like_tools(column: str) -> bool:
    """Whether a column that is not read may hold declarations: `tool_list` and `Functions`, not `tool_calls`."""
    if column in (*COLUMNS, *NO_DECLARATIONS):
        return False
    name = column.lower()
    return SUSPICIOUS.search(name) is not None and CALLS.search(name) is None


def _canonical(tools: object) -> object:
    """Declarations for a comparison: in any order, under any wrapper."""
    if not isinstance(tools, list):
        return tools
    functions = [get(tool, "function") or tool for tool in tools]
    return sorted(json.dumps(function, sort_keys=True, default=str) for function in functions)
