"""Declarations of tools in whatever form, in OpenAI's: {"type": "function", "function": {"name", "description", …}}.

    {"type": "function", "name", "description", "parameters", "strict"}         OpenAI Responses
    {"name", "description", "input_schema"}                                     Anthropic
    {"name", "title", "description", "inputSchema", "annotations"}              MCP; {"tools": […]} around a list
    {"functionDeclarations": [{"name", "parameters"}, …]}                       Gemini
    {"toolSpec": {"name", "inputSchema": {"json": {…}}}}                        Bedrock
    {"name", "args_schema": {…}}, {"name", "args": {"city": {…}}}               LangChain
    {"name", "parameter_definitions": {"city": {"type": "str", …}}}             Cohere
    {"name", "parameters": {"city": {"type": "str", "default": "Rome"}}}        xLAM: parameters without `properties`
    {"name", "parameters": [{"name": "city", "type": "string"}]}                Qwen-Agent
    {"city_weather": {"description", "inputSchema"}, …}                         AI SDK: names as keys

A single one may stand without a list, and any of them as JSON text. Whether they are right is checked by `schema.py`.
"""

import json
import marshal
from collections import Counter
from typing import Any, cast

from gemma_dist.data.calls import first_of
from gemma_dist.data.schema_types import is_optional, parse_type
from gemma_dist.data.schema_walk import CONSTRAINTS, ONE, SEVERAL
from gemma_dist.data.strict import (
    as_list,
    as_object,
    error_context,
    get,
    is_json_text,
    is_list_of,
    parse_json,
    read_json_text,
    short,
    without,
    without_nulls,
)
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

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
# What other forms say of a tool, which is not taken.
NAME_KEYS = ("api_name", "function_name", "func_name", "tool_name", "name")
DESCRIPTION_KEYS = ("description", "api_description", "required_parameters", "optional_parameters", "signature")
MAX_LEVELS = 4
OPENAI_KEYS = ("name", "description", "parameters")

# Keys that make an object without `properties` a schema; any other one may be a parameter.
_SCHEMA_WORDS = ("$ref", "$defs", "definitions", "additionalProperties", "patternProperties", "dependentSchemas")
ANNOTATIONS = ("default", "deprecated", "example", "examples", "readOnly", "strict", "writeOnly", "propertyOrdering")
_BESIDE_FLAT = ("type", "required", "title", "description", "$schema", "additionalProperties")

_NUM_KNOWN = 4096
_known: dict[bytes, tuple[object, Counter[str]]] = {}  # declarations in OpenAI's form, and the notes on them

FLAT_NOTE = "declarations had parameters without `properties` around them"


def decode_tools(value: object) -> object:
    """The value, read from JSON text where it, or an entry of it, is some: '[{"name": "f"}]', ['{"name": "f"}']."""
    decoded = parse_json(value) if isinstance(value, str) and value.strip() else value
    return list(map(_decoded_entry, decoded)) if isinstance(decoded, list) else decoded


def _decoded_entry(value: object) -> object:
    """The value, read from JSON text where it is that of an object."""
    return parse_json(value) if is_json_text(value, ("{",)) else value


def declared_tools(value: object) -> object:
    """The declarations that a column holds: objects with a name, and a description or schema; None without one."""
    try:
        decoded = decode_tools(value)
        declares = any(map(_is_declaration, as_list(_listed(decoded))))
        return to_openai_tools(decoded, Counter()) if declares else None
    except DataError:
        return None


def foreign_names(value: object, depth: int = 0) -> list[str]:
    """The names of tools that a column declares in a form that is not taken, on whatever level; none without one.

    [{"tool_name": "t", "api_name": "f", "api_description": "…", "required_parameters": […]}]  ->  ["f"]    ToolBench
    [{"name": "server", "url": "…", "tools": [{"name": "f", "inputSchema": {…}}]}]             ->  ["f"]    MCP
    """
    try:
        value = decode_tools(value) if is_json_text(value) else value
    except DataError:
        return []
    if depth > MAX_LEVELS or not isinstance(value, (dict, list)):
        return []
    inner = value if isinstance(value, list) else [*value.values()]
    name = first_of(value, NAME_KEYS)
    says = any(get(value, key) is not None for key in (*DESCRIPTION_KEYS, *SCHEMA_KEYS))
    lists_tools = any(is_list_of(item, dict) and item and first_of(item[0], NAME_KEYS) is not None for item in inner)
    if isinstance(name, str) and says and not lists_tools:
        return [name]
    names: list[str] = []
    for item in inner:
        names += foreign_names(item, depth + 1)
    return names


def to_openai_tools(given: object, notes: Counter[str]) -> object:
    """Declarations in OpenAI's form; what is no list of them passes. Equal ones are one object, which nobody changes:
    rows share their tools, and what is found out of one is remembered by its identity (`shared.py`)."""
    listed = _listed(given)
    if not isinstance(listed, list):
        return given
    tools: list[object] = []
    for number, tool in enumerate(listed, start=1):
        with error_context(f"tool {number}"):
            tools.append(_shared_tool(tool, notes))
    return tools


def _listed(given: object) -> object:
    """One list, of whatever wraps declarations; what is no list of them passes.

    {"tools": [{"name": "f", …}]}                       ->  [{"name": "f", …}]          MCP, Gemini
    {"result": {"tools": [{"name": "f", …}]}}           ->  [{"name": "f", …}]          MCP's answer to tools/list
    {"name": "f", "description": "…"}                   ->  [{"name": "f", …}]
    {"f": {"description": "…", "inputSchema": {…}}}     ->  [{"name": "f", …}]          AI SDK
    [{"functionDeclarations": [{"name": "f", …}]}]      ->  [{"name": "f", …}]          Gemini
    """
    if isinstance(given, dict):
        given = _listed_object(given)
    if not isinstance(given, list):
        return given
    listed: list[object] = []
    for tool in given:
        wrapped = _wrapped(tool)
        listed += [tool] if wrapped is None else wrapped
    return listed


def _listed_object(given: RawRow) -> object:
    """As `_listed`, of an object, whose wrapper may stay."""
    if "tools" in as_object(given.get("result")):
        given = as_object(given["result"])
    if _wrapped(given) is not None or _is_declaration(given):
        return [given]
    if given and all(map(_says_something, given.values())):
        return [{"name": name, **as_object(value)} for name, value in given.items()]
    return given


def _wrapped(tool: object) -> list[object] | None:
    """The declarations in a wrapper of Gemini or MCP; None where it is none."""
    if all(get(tool, key) is None for key in WRAPPERS):
        return None
    given = without(without_nulls(as_object(tool)), *BESIDE_LIST)
    (key, *others) = given or [""]
    inside = given.get(key)
    is_wrapper = key in WRAPPERS and not others
    return inside if is_wrapper and isinstance(inside, list) else None


def _is_declaration(tool: object) -> bool:
    """Whether a value is one declaration: an object that has more than a name."""
    is_wrapped = isinstance(get(tool, "function"), dict) or isinstance(get(tool, "toolSpec"), dict)
    return is_wrapped or (isinstance(get(tool, "name"), str) and _says_something(tool))


def _says_something(tool: object) -> bool:
    """Whether an object has a description or a schema."""
    return any(get(tool, key) is not None for key in ("description", *SCHEMA_KEYS))


# ---- one declaration -------------------------------------------------------------------------------------------------


def _shared_tool(tool: object, notes: Counter[str]) -> object:
    """One declaration in OpenAI's form, which is the same object for equal ones; what is none passes."""
    try:
        key = marshal.dumps(cast(Any, tool), 2)  # the same bytes for what says the same, and sooner than JSON
    except ValueError:  # of a struct of Arrow, whose nulls mean something else
        return _to_openai_tool(tool, notes)
    found = _known.get(key)
    if found is None:
        try:
            copied = json.loads(json.dumps(tool))
        except (TypeError, ValueError):  # bytes, of parquet
            return _to_openai_tool(tool, notes)
        own: Counter[str] = Counter()
        found = (_to_openai_tool(copied, own), own)
        if len(_known) >= _NUM_KNOWN:
            _known.clear()
        _known[key] = found
    converted, noted = found
    if noted:
        notes.update(noted)
    return converted


def _to_openai_tool(tool: object, notes: Counter[str]) -> object:
    """One declaration in OpenAI's form; what is none passes.

    {"toolSpec": {"name": "f", "inputSchema": {"json": {…}}}}  ->  {"type": "function", "function": {"name": "f", …}}
    """
    spec = get(tool, "toolSpec")
    tool = spec if isinstance(spec, dict) else tool
    if not isinstance(tool, dict):
        return tool
    inside = _decoded_entry(tool.get("function"))
    if isinstance(inside, dict):
        return tool | {"function": _to_openai_function(inside, notes)}
    is_function = tool.get("type") in (None, "function") or "input_schema" in tool  # Anthropic's type is "custom"
    if "name" not in tool or not is_function:
        return tool
    return {"type": "function", "function": without(_to_openai_function(tool, notes), "type")}


def _to_openai_function(function: RawRow, notes: Counter[str]) -> RawRow:
    """The function with its schema under `parameters`. OpenAI's own keeps whatever it has.

    {"name": "f", "title": "F", "inputSchema": {…}} -> {"name": "f", "parameters": {…}}
    """
    key, *others = [key for key in SCHEMA_KEYS if function.get(key) is not None] or [""]
    if not key:
        return function
    with error_context(f"`{key}`"):
        schema = _parameters(function[key], key, notes)
    for other in others:
        if other not in FLAT_KEYS and _parameters(function[other], other, Counter()) != schema:
            raise DataError(f"`{key}` and `{other}` say different things; keep one of the two")
    if key == "parameters":
        return function | {"parameters": schema}
    left_out = sorted(without_nulls(without(function, *OPENAI_KEYS, *SCHEMA_KEYS, *SILENT)))
    if left_out:
        notes[f"keys of declarations that no prompt shows were left out: {', '.join(left_out)}"] += 1
    kept = {name: function[name] for name in ("name", "description") if name in function}
    return kept | {"parameters": schema}


def _parameters(given: object, key: str, notes: Counter[str]) -> object:
    """What stands under a key that holds the schema, as one of type object. Bedrock's is {"json": {…}}."""
    schema = read_json_text(given, key)
    if key == "inputSchema" and isinstance(get(schema, "json"), dict):
        schema = get(schema, "json")
    parameters = _with_properties(schema, is_flat=key in FLAT_KEYS)
    if parameters is not schema:
        notes[FLAT_NOTE] += 1
    return parameters


def _with_properties(schema: object, *, is_flat: bool) -> object:
    """A schema of type object; parameters without `properties` around them, or as a list, get them.

    {"city": {"type": "str"}}                                ->  {"type": "object", "properties": {"city": {…}}}
    [{"name": "city", "type": "string"}]                     ->  the same
    {"city": "str"}                                          ->  the same
    {"type": "dict", "city": {…}, "required": ["city"]}      ->  {…, "required": ["city"]}

    Args:
        is_flat: whether it is known to be the first of these, even where a parameter is called "properties".
    """
    if isinstance(schema, list):
        return _named_parameters(schema)
    if not isinstance(schema, dict) or not schema:
        return schema
    flat = without_nulls(schema)
    if is_flat or _is_flat(flat):
        return _object_of(flat)
    beside = {key: flat[key] for key in _BESIDE_FLAT if key in flat and not _is_parameter(key, flat[key])}
    inner = without(flat, *beside)
    if _is_schema(inner):
        return schema
    return _object_of({name: _typed_parameter(name, value) for name, value in inner.items()}) | beside


def _is_parameter(key: str, value: object) -> bool:
    """Whether a key that JSON schema has a meaning for is a parameter: {"title": "string", "body": "string"}."""
    return isinstance(value, dict) or (key in ("title", "description") and _is_type(value))


def _is_type(value: object) -> bool:
    """Whether a value is the name of a type: "int", "List[str]"."""
    try:
        return isinstance(value, str) and parse_type(value) is not None
    except DataError:
        return False


def _is_schema(inner: RawRow) -> bool:
    """Whether what stands beside type and title is JSON schema's, and none of it a parameter."""
    if not inner.keys().isdisjoint(("properties", *_SCHEMA_WORDS, *ONE, *SEVERAL)):
        return True
    return all(key in CONSTRAINTS or key in ANNOTATIONS or key.startswith(("$", "x-", "x_")) for key in inner)


def _typed_parameter(name: str, value: object) -> object:
    """The schema of a parameter that may be its type alone: "int" -> {"type": "int"}. DataError for other words."""
    if isinstance(value, dict):
        return value
    if _is_type(value):
        return {"type": value}
    raise DataError(
        f"the parameter {short(name)} is {short(value)}; write its schema: "
        f'{{"properties": {{{json.dumps(name)}: {{"type": "string", "description": ...}}}}}}'
    )


def _named_parameters(listed: list[object]) -> object:
    """A list of parameters with their names as a schema; a list of anything else passes."""
    names = [get(one, "name") for one in listed]
    if not names or not is_list_of(names, str):
        return listed
    if len(set(names)) < len(names):
        raise DataError(f"two parameters have one name: {short(names)}; rename one")
    return _object_of({one["name"]: without(one, "name") for one in map(as_object, listed)})


def _is_flat(schema: RawRow) -> bool:
    """Whether an object has parameters as its keys: each is a schema, and none makes the object itself one."""
    if not is_list_of([*schema.values()], dict) or not schema.keys().isdisjoint(_SCHEMA_WORDS):
        return False
    properties = schema.get("properties")
    is_parameter = isinstance(properties, dict) and any(isinstance(value, str) for value in properties.values())
    return properties is None or is_parameter


def _object_of(parameters: RawRow) -> RawRow:
    """The schema of an object with these properties.

    Which are required is only said where it is certain: by `required: true` of a parameter (which `schema.py` moves),
    or, where some say in their type that they are optional, of the others that have no default.

    {"a": {"type": "int"}, "b": {"type": "int, optional"}} -> {"type": "object", "properties": {…}, "required": ["a"]}
    """
    schema: RawRow = {"type": "object", "properties": parameters}
    optional = [name for name, value in parameters.items() if is_optional(get(value, "type"))]
    required = [name for name, value in parameters.items() if name not in optional and not _may_be_absent(value)]
    return schema | {"required": required} if optional and required else schema


def _may_be_absent(parameter: object) -> bool:
    """Whether a parameter has a default, or says that it is not required."""
    return "default" in as_object(parameter) or get(parameter, "required") is False
