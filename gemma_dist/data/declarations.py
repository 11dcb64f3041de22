"""Declarations of tools, wherever a row holds them and in whatever form, in OpenAI's form.

Where: the columns `tools`, `functions` (OpenAI until 2023), `available_tools` (Toucan), `chat_template_kwargs`, and
`tools` of the first system message (GLM). Several that say the same are one; several that do not are refused.

How each declaration may look, besides {"type": "function", "function": {"name", "description", "parameters"}}:

    {"type": "function", "name", "description", "parameters", "strict"}         OpenAI Responses
    {"name", "description", "input_schema"}                                     Anthropic
    {"name", "title", "description", "inputSchema", "annotations"}              MCP; {"tools": […]} around a list
    {"functionDeclarations": [{"name", "parameters"}, …]}                       Gemini
    {"toolSpec": {"name", "inputSchema": {"json": {…}}}}                        Bedrock
    {"name", "args_schema": {…}}, {"name", "args": {"city": {…}}}               LangChain
    {"name", "parameters": {"city": {"type": "str", "default": "Rome"}}}        xLAM: parameters without `properties`
    {"name", "parameters": [{"name": "city", "type": "string"}]}                Qwen-Agent
    {"city_weather": {"description", "inputSchema"}, …}                         AI SDK: names as keys

A single one may stand without a list, and any of them as JSON text. Whether they are right is checked by `schema.py`.
"""

import json
from collections import Counter

from gemma_dist.data.layouts.turns import NumberedMessages, number_turns, turn_name
from gemma_dist.data.schema_types import is_optional
from gemma_dist.data.schema_walk import CONSTRAINTS
from gemma_dist.data.strict import error_context, get, parse_json, read_json_text, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

COLUMNS = ("tools", "functions", "available_tools")
NO_DECLARATIONS = ("tool_choice", "tool_config", "toolConfig")  # of a request: they name a tool at most
SUSPICIOUS = ("tool", "function", "apis", "api_list")  # in a column's name
CALLS = ("call", "result", "response")  # in the name of a column that is about calls

WRAPPERS = ("function_declarations", "functionDeclarations", "tools")
BESIDE_LIST = ("nextCursor", "_meta", "toolChoice", "tool_choice")  # in a wrapper, and none of them a tool
SCHEMA_KEYS = (
    "parameters",
    "input_schema",
    "inputSchema",
    "args_schema",
    "parametersJsonSchema",
    "parameters_json_schema",
    "parameter_definitions",
    "args",
)
FLAT_KEYS = ("args", "parameter_definitions")  # whose value is always flat
# What the forms other than OpenAI's have besides name, description and schema, and no one misses in a prompt.
SILENT = ("type", "cache_control", "strict")
OPENAI_KEYS = ("name", "description", "parameters")

# Keys that make an object without `properties` a schema; any other one may be a parameter.
_SCHEMA_WORDS = ("$ref", "$defs", "definitions", "additionalProperties", "patternProperties", "dependentSchemas")
_BESIDE_FLAT = ("type", "required", "title", "description", "$schema", "additionalProperties")

FLAT_NOTE = "declarations had parameters without `properties` around them"


def find_declarations(row: RawRow, tools: object, messages: NumberedMessages, notes: Counter[str]) -> object:
    """The row's declarations as a list in OpenAI's form; what is none stays as it is, to be refused with the rest.

    Args:
        tools: what the layout found; most often the column `tools`.
        messages: as the layout converted them.
        notes: get a count of what was left out.

    Raises:
        DataError: two places declare different tools; a column looks like declarations and is not one that is read.
    """
    found: dict[str, object] = {}
    for place, value in _places(row, tools, messages).items():
        with error_context(f"`{place}`"):
            declared = to_openai_tools(_decoded(value), notes)
        if declared:
            found[place] = declared
    first, *others = found or ["tools"]
    for other in others:
        if _canonical(found[other]) != _canonical(found[first]):
            raise DataError(f"`{first}` and `{other}` declare different tools; keep one of the two")
    _refuse_unread(row, found.get(first))
    return found.get(first)


def _places(row: RawRow, tools: object, messages: NumberedMessages) -> dict[str, object]:
    """What each place of a row that may hold declarations says, by its name in errors."""
    given = {
        "tools": tools or row.get("tools"),
        "functions": row.get("functions"),
        "available_tools": _unless_names(row.get("available_tools")),
        "chat_template_kwargs.tools": get(row.get("chat_template_kwargs"), "tools"),
    }
    turns = list(messages)
    conversations = row.get("conversations")
    if isinstance(conversations, list) and not row.get("messages"):
        turns += number_turns(conversations)
    for number, turn in turns:
        if get(turn, "tools"):
            role = get(turn, "role") or get(turn, "from")
            if number > 1 or role not in ("system", "developer"):
                raise DataError(
                    f"{turn_name(number, role)}: `tools` of a message that is not the first system message; declare "
                    "all tools in the row's `tools`"
                )
            given["tools of the system message"] = get(turn, "tools")
    return {place: value for place, value in given.items() if value}


def without_tools(message: object) -> object:
    """A message without the declarations that it brought."""
    if not isinstance(message, dict) or "tools" not in message:
        return message
    return {key: value for key, value in message.items() if key != "tools"}


def _unless_names(value: object) -> object:
    """A column of declarations; None where it only names tools, as test cases of tutorials do."""
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        return None
    with error_context("`available_tools`"):
        decoded = _decoded(value)
    if isinstance(decoded, list) and all(isinstance(name, str) for name in decoded):
        return None
    return decoded


def _refuse_unread(row: RawRow, found: object) -> None:
    """Refuse a column that declares other tools than those that were found, under a name that is not read."""
    for column, value in row.items():
        name = str(column).lower()
        is_read = column in (*COLUMNS, *NO_DECLARATIONS)
        is_suspicious = any(word in name for word in SUSPICIOUS) and not any(word in name for word in CALLS)
        if not is_suspicious or is_read:
            continue
        declared = _declared(value)
        if declared is not None and _canonical(declared) != _canonical(found):
            raise DataError(f"the column `{column}` declares tools, but is not read; rename it to `tools`")


def _declared(value: object) -> object:
    """The declarations that a column holds: objects with a name, and a description or schema; None without one."""
    try:
        decoded = _decoded(value)
        listed = _listed(decoded)
        if isinstance(listed, list) and any(isinstance(tool, dict) and _is_declaration(tool) for tool in listed):
            return to_openai_tools(decoded, Counter())
    except DataError:
        pass
    return None


def _canonical(tools: object) -> object:
    """Declarations for a comparison: in any order, under any wrapper."""
    if not isinstance(tools, list):
        return tools
    functions = [get(tool, "function") or tool for tool in tools]
    return sorted(json.dumps(function, sort_keys=True, default=str) for function in functions)


def _decoded(value: object) -> object:
    """The value, read from JSON text where it, or an entry of it, is some."""
    decoded = parse_json(value) if isinstance(value, str) and value.strip() else value
    if not isinstance(decoded, list):
        return decoded
    return [parse_json(one) if isinstance(one, str) and one.lstrip()[:1] == "{" else one for one in decoded]


# ---- forms of a list -------------------------------------------------------------------------------------------------


def to_openai_tools(given: object, notes: Counter[str]) -> object:
    """Declarations in OpenAI's form; what is no list of them passes."""
    listed = _listed(given)
    if not isinstance(listed, list):
        return given
    tools: list[object] = []
    for number, tool in enumerate(listed, start=1):
        with error_context(f"tool {number}"):
            tools.append(_to_openai_tool(tool, notes))
    return tools


def _listed(given: object) -> object:
    """One list, of whatever wraps declarations."""
    if isinstance(given, dict):
        result = given.get("result")
        if isinstance(result, dict) and "tools" in result:  # what an MCP server answers to tools/list
            given = result
        if _wrapped(given) is not None or _is_declaration(given):
            given = [given]
        elif given and all(map(_says_something, given.values())):
            given = [{"name": name, **_as_object(value)} for name, value in given.items()]
    if not isinstance(given, list):
        return given
    listed: list[object] = []
    for tool in given:
        wrapped = _wrapped(tool)
        listed += [tool] if wrapped is None else wrapped
    return listed


def _as_object(value: object) -> RawRow:
    return value if isinstance(value, dict) else {}


def _wrapped(tool: object) -> list[object] | None:
    """The declarations in a wrapper of Gemini or MCP; None where it is none."""
    given = {key: value for key, value in _as_object(tool).items() if value is not None and key not in BESIDE_LIST}
    for key in WRAPPERS:
        inside = given.get(key)
        if isinstance(inside, list) and len(given) == 1:
            return inside
    return None


def _is_declaration(tool: RawRow) -> bool:
    """Whether an object is one declaration: it has more than a name."""
    if isinstance(tool.get("function"), dict) or isinstance(tool.get("toolSpec"), dict):
        return True
    return isinstance(tool.get("name"), str) and _says_something(tool)


def _says_something(tool: object) -> bool:
    keys = ("description", *SCHEMA_KEYS)
    return isinstance(tool, dict) and any(tool.get(key) is not None for key in keys)


# ---- one declaration -------------------------------------------------------------------------------------------------


def _to_openai_tool(tool: object, notes: Counter[str]) -> object:
    spec = get(tool, "toolSpec")
    if isinstance(spec, dict):
        tool = spec
    if not isinstance(tool, dict):
        return tool
    inside = tool.get("function")
    if isinstance(inside, dict):
        return tool | {"function": _to_openai_function(inside, notes)}
    is_function = tool.get("type") in (None, "function") or "input_schema" in tool
    if "name" not in tool or not is_function:
        return tool
    function = _to_openai_function(tool, notes)
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}


def _to_openai_function(function: RawRow, notes: Counter[str]) -> RawRow:
    """The function with its schema under `parameters`. OpenAI's own keeps whatever it has."""
    keys = [key for key in SCHEMA_KEYS if function.get(key) is not None]
    if not keys:
        return function
    key = keys[0]
    with error_context(f"`{key}`"):
        schema = _parameters(function[key], key, notes)
    for other in keys[1:]:
        if other not in FLAT_KEYS and _parameters(function[other], other, Counter()) != schema:
            raise DataError(f"`{key}` and `{other}` say different things; keep one of the two")
    if key == "parameters":
        return function | {"parameters": schema}
    others = [name for name in function if name not in (*OPENAI_KEYS, *SCHEMA_KEYS, *SILENT)]
    left_out = [name for name in sorted(others) if function[name] is not None]
    if left_out:
        notes[f"keys of declarations that no prompt shows were left out: {', '.join(left_out)}"] += 1
    kept = {name: function[name] for name in ("name", "description") if name in function}
    return kept | {"parameters": schema}


def _parameters(given: object, key: str, notes: Counter[str]) -> object:
    """What stands under a key that holds the schema, as one of type object."""
    schema = read_json_text(given, key)
    if key == "inputSchema" and isinstance(get(schema, "json"), dict):
        schema = get(schema, "json")
    parameters = _with_properties(schema, is_flat=key in FLAT_KEYS)
    if parameters is not schema:
        notes[FLAT_NOTE] += 1
    return parameters


def _with_properties(schema: object, *, is_flat: bool) -> object:
    """A schema of type object; parameters without `properties` around them, or as a list, get them."""
    if isinstance(schema, list) and schema and all(isinstance(get(one, "name"), str) for one in schema):
        named: RawRow = {one["name"]: {key: one[key] for key in one if key != "name"} for one in schema}
        if len(named) < len(schema):
            raise DataError(f"two parameters have one name: {short([one['name'] for one in schema])}; rename one")
        return _object_of(named)
    if not isinstance(schema, dict) or not schema:
        return schema
    flat = {key: value for key, value in schema.items() if value is not None}
    if is_flat or _is_flat(flat):
        return _object_of(flat)
    beside = {key: flat.pop(key) for key in _BESIDE_FLAT if key in flat and not isinstance(flat[key], dict)}
    if "type" in beside and "properties" not in flat and flat and _is_flat(flat) and not _known_words(flat):
        return _object_of(flat) | beside
    return schema


def _is_flat(schema: RawRow) -> bool:
    """Whether an object has parameters as its keys: each is a schema, and none makes the object itself one."""
    if not all(isinstance(value, dict) for value in schema.values()):
        return False
    if any(word in schema for word in _SCHEMA_WORDS):
        return False
    properties = schema.get("properties")
    if isinstance(properties, dict):  # it may be the name of a parameter
        return any(isinstance(value, str) for value in properties.values())
    return True


def _known_words(schema: RawRow) -> bool:
    """Whether JSON schema has a meaning for one of the keys."""
    return any(key in CONSTRAINTS for key in schema)


def _object_of(parameters: RawRow) -> RawRow:
    """The schema of an object with these properties.

    Which are required is only said where it is certain: by `required: true` of a parameter (which `schema.py` moves),
    or, where some say in their type that they are optional, of the others that have no default.
    """
    schema: RawRow = {"type": "object", "properties": parameters}
    if any(is_optional(get(value, "type")) for value in parameters.values()):
        required = []
        for name, value in parameters.items():
            has_default = isinstance(value, dict) and "default" in value
            if not has_default and not is_optional(get(value, "type")) and get(value, "required") is not False:
                required.append(name)
        if required:
            schema["required"] = required
    return schema
