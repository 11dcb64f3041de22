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
from collections.abc import Mapping

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
    without_nulls,
)
from gemma_dist.data.tool_forms import (
    NAME_KEYS,
    SCHEMA_KEYS,
    SILENT,
    declared_tools,
    decode_tools,
    foreign_names,
    to_openai_tools,
)
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

COLUMNS = ("tools", "functions", "available_tools")
NO_DECLARATIONS = ("tool_choice", "tool_config", "toolConfig")  # of a request: they name a tool at most
SUSPICIOUS = re.compile(r"tool|function|(?<![a-z])apis?(?![a-z])|(?<![a-z])mcp(?![a-z])")  # in a column's name
ABOUT_SERVERS = re.compile("server|info|meta|config|provider|categor")  # in the name of a column that may be about them
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
    places = _places(row, tools, messages)
    declared = {place: read_declarations(place, value, notes) for place, value in places.items()}
    declared = {place: found for place, found in declared.items() if found}
    first, *others = declared or ["tools"]
    for other in others:
        if _canonical(declared[other]) != _canonical(declared[first]):
            raise DataError(f"`{first}` and `{other}` declare different tools; keep one of the two")
    _refuse_unread(row, first, declared.get(first))
    return declared.get(first)


def read_declarations(place: str, value: object, notes: Counter[str]) -> object:
    """What one place of a row declares, in OpenAI's form; None where it is empty."""
    with error_context(f"`{place}`"):
        return (to_openai_tools(decode_tools(value), notes) or None) if value else None


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


def _refuse_unread(row: RawRow, place: str, found: object) -> None:
    """Refuse a column that declares other tools than those that were found, under a name that is not read.

    One that repeats some of them passes: {"tools": [f, g], "target_tools": [f]}.
    """
    columns = [column for column in row if _sounds_like_tools(str(column))]
    functions = _by_name(found) if columns else {}
    remedy = f"write them into `{place}`, or remove one of the two columns" if functions else "rename it to `tools`"
    for column in columns:
        value = row[column]
        if functions and ABOUT_SERVERS.search(str(column).lower()):
            value = _without_servers(value)
        declared = declared_tools(value)
        if declared is not None and not all(_repeats(tool, functions) for tool in as_list(declared)):
            others = f" that `{place}` does not, or not like this" if functions else ", but is not read"
            raise DataError(f"the column `{column}` declares tools{others}; {remedy}")
        unread = [name for name in foreign_names(value) if name not in functions]
        if unread:
            raise DataError(
                f"the column `{column}` declares {short(unread)} in a form that is not read; write as `tools`: "
                '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}], '
                "or remove the column"
            )


def _by_name(tools: object) -> dict[str, RawRow]:
    """What each declaration says, by its name; without those that have none."""
    functions = [as_object(_function(tool)) for tool in as_list(tools)]
    return {function["name"]: function for function in functions if isinstance(function.get("name"), str)}


def _repeats(tool: object, functions: Mapping[str, RawRow]) -> bool:
    """Whether a declaration says nothing but what the one of its name among `functions` says; it may say less of it."""
    function = without(without_nulls(as_object(_function(tool))), *SILENT)
    name = function.get("name")
    found = functions.get(name, {}) if isinstance(name, str) else {}
    return bool(function) and all(key in found and found[key] == value for key, value in function.items())


def _without_servers(value: object) -> object:
    """A column about servers without what it says of them, so that only what they declare is left to be looked at.

    {"name": "s", "description": "d"}                       ->  [{}]
    [{"name": "s", "description": "d", "tools": [{…}]}]     ->  [{"tools": [{…}]}]
    {"s": {"description": "d", "command": "uvx"}}           ->  [{"command": "uvx"}]
    """
    try:
        decoded = decode_tools(value) if is_json_text(value) else value
    except DataError:
        return value
    if isinstance(decoded, dict):
        are_servers = bool(decoded) and is_list_of([*decoded.values()], dict)
        decoded = [*decoded.values()] if are_servers else [decoded]
    return [_without_server(entry) for entry in decoded] if isinstance(decoded, list) else decoded


def _without_server(entry: object) -> object:
    """An entry without name and description, unless it has a schema, as a tool has."""
    given = as_object(entry)
    has_schema = any(given.get(key) is not None for key in SCHEMA_KEYS)
    is_server = bool(given) and not has_schema and "function" not in given
    return without(given, *NAME_KEYS, "description") if is_server else entry


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
    return sorted(json.dumps(_function(tool), sort_keys=True, default=str) for tool in tools)


def _function(tool: object) -> object:
    """What a declaration says, whatever its wrapper."""
    return get(tool, "function") or tool
