"""Types as people write them, as those of JSON schema; and `required: true` where it stands at a parameter.

    {"type": "STRING"}                  {"type": "string"}                                      Gemini
    {"type": "dict"}                    {"type": "object"}                                      BFCL, ToolACE
    {"type": "List[int]"}               {"type": "array", "items": {"type": "integer"}}         xLAM
    {"type": "Optional[str]"}           {"type": "string", "nullable": true}
    {"type": "int, optional"}           {"type": "integer"}
    {"type": "any"}                     {}                                                      any value

A type that nobody knows (`float64`) is refused with the list of those that are taken.
"""

import ast
import re
from collections import Counter

from gemma_dist.data.schema_walk import map_subschemas
from gemma_dist.data.strict import get, short
from gemma_dist.data.types import Json, JsonObject
from gemma_dist.errors import DataError

JSON_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")
_SYNONYMS = {
    "string": "string str text",
    "number": "number float double",
    "integer": "integer int long",
    "boolean": "boolean bool",
    "array": "array list tuple set frozenset sequence iterable",
    "object": "object dict map mapping",
    "null": "null none nonetype",
    "any": "any callable type_unspecified",  # which JSON has no type for
}
# Type as written, in lower case -> type of JSON schema, or "any".
TYPES: dict[str, str] = {}
for _type, _names in _SYNONYMS.items():
    TYPES |= dict.fromkeys(_names.split(), _type)
_PYTHON_TYPE = re.compile(r"[\w .,|\[\]'\"-]{1,200}")  # what is parsed as one, for which nothing is ever run

TYPE_NOTE = "types of parameters were written in another way (dict, float, STRING) and became those of JSON schema"
REQUIRED_NOTE = "`required: true` of a parameter became an entry of `required`, where JSON schema has it"


def normalize_schema(schema: JsonObject, notes: Counter[str]) -> JsonObject:
    """The schema with JSON schema's types, and `required` as a list, on every level; `notes` count what was changed.

    Raises:
        DataError: a type is none, and no known name of one.
    """
    found: set[str] = set()

    def normalize(given: JsonObject) -> JsonObject:
        lifted = _lift_required(given)
        if lifted != given:
            found.add(REQUIRED_NOTE)
        typed = _with_json_type(lifted)
        if typed != lifted:
            found.add(TYPE_NOTE)
        return map_subschemas(typed, normalize)

    normalized = normalize(schema)
    notes.update(found)
    return normalized


def _lift_required(schema: JsonObject) -> JsonObject:
    """The schema with `required: true` of its properties in its own list of required ones."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not (required is None or isinstance(required, list)):
        return schema
    lifted: JsonObject = {}
    names = list(required or [])
    for name, value in properties.items():
        flag = get(value, "required")
        if not isinstance(value, dict) or not isinstance(flag, bool):
            lifted[name] = value
            continue
        lifted[name] = {key: item for key, item in value.items() if key != "required"}
        if flag and name not in names:
            names.append(name)
    changed = schema | {"properties": lifted}
    return changed | {"required": names} if names else changed


def _with_json_type(schema: JsonObject) -> JsonObject:
    given = schema.get("type")
    if isinstance(given, str) and given not in JSON_TYPES:
        rest = {key: value for key, value in schema.items() if key != "type"}
        parsed = parse_type(given)
        return parsed | rest if "type" not in parsed else {"type": parsed["type"]} | parsed | rest
    if isinstance(given, list):
        types = [_simple_type(name) if isinstance(name, str) else name for name in given]
        if "any" in types:
            return {key: value for key, value in schema.items() if key != "type"}
        return schema | {"type": types}
    return schema


def is_optional(type_name: object) -> bool:
    """Whether a type says that its parameter may be left out: `int, optional`, `Optional[int]`."""
    if not isinstance(type_name, str):
        return False
    return _without_optional(type_name) != type_name.strip() or type_name.strip().lower().startswith("optional[")


def _without_optional(type_name: str) -> str:
    """`int` of `int, optional`."""
    name, comma, behind = type_name.strip().rpartition(",")
    return name.strip() if comma and behind.strip().lower() == "optional" else type_name.strip()


def parse_type(type_name: str) -> JsonObject:
    """The schema that a type stands for: {"type": "array", "items": {"type": "integer"}} for `List[int]`.

    Raises:
        DataError: nobody knows the type.
    """
    name = _without_optional(type_name)
    if name.lower() in TYPES:
        return _typed(_simple_type(name))
    if not _PYTHON_TYPE.fullmatch(name):
        raise _unknown(type_name)
    if name.endswith("[]"):
        return {"type": "array", "items": parse_type(name[:-2])}
    try:
        return _from_python(ast.parse(name, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unknown(type_name) from None


def _simple_type(name: str) -> str:
    found = TYPES.get(name.strip().lower())
    if found is None:
        raise _unknown(name)
    return found


def _unknown(type_name: str) -> DataError:
    return DataError(
        f"{short(type_name)} is no type; write one of {', '.join(JSON_TYPES)}, or leave the type out where any value "
        "is right"
    )


def _typed(name: str) -> JsonObject:
    return {} if name == "any" else {"type": name}


def _from_python(node: ast.expr) -> JsonObject:
    """The schema for a type of Python. DataError, or ValueError for a literal that is none, where it is not known."""
    if isinstance(node, ast.Constant) and node.value is None:
        return {"type": "null"}
    if isinstance(node, ast.Name | ast.Attribute):
        return _typed(_simple_type(_last_name(node)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_from_python(node.left), _from_python(node.right)])
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name | ast.Attribute):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _from_generic(_last_name(node.value).lower(), inside)
    raise _unknown(ast.unparse(node))


def _last_name(node: ast.Name | ast.Attribute) -> str:
    """`List` of `List` and of `typing.List`."""
    return node.id if isinstance(node, ast.Name) else node.attr


def _from_generic(name: str, inside: list[ast.expr]) -> JsonObject:
    """The schema for `Name[inside]`."""
    if name == "optional":
        return _union([*map(_from_python, inside), {"type": "null"}])
    if name == "union":
        return _union([*map(_from_python, inside)])
    if name == "literal":
        return {"enum": [_literal(node) for node in inside]}
    kind = _simple_type(name)
    if name == "tuple":
        return _tuple(inside)
    if kind == "array":
        return {"type": "array", "items": _from_python(inside[0])}
    if kind == "object":
        return {"type": "object", "additionalProperties": _from_python(inside[-1])}
    if kind == "any":
        return {}
    raise _unknown(name)


def _literal(node: ast.expr) -> Json:
    value = ast.literal_eval(node)
    if value is None or isinstance(value, str | int | float):
        return value
    raise _unknown(ast.unparse(node))


def _tuple(inside: list[ast.expr]) -> JsonObject:
    """`Tuple[int, ...]` has any length, `Tuple[int, str]` a fixed one."""
    if isinstance(inside[-1], ast.Constant) and inside[-1].value is ...:
        return {"type": "array", "items": _from_python(inside[0])}
    parts: list[Json] = [*map(_from_python, inside)]
    is_uniform = all(part == parts[0] for part in parts)
    inner: JsonObject = {"items": parts[0]} if is_uniform else {"prefixItems": parts}
    return {"type": "array", **inner, "minItems": len(parts), "maxItems": len(parts)}


def _union(parts: list[JsonObject]) -> JsonObject:
    """Any of the parts; null becomes `nullable`, which Gemma's template shows."""
    others: list[Json] = [part for part in parts if part != {"type": "null"}]
    if {} in others or not others:
        return {}
    one = others[0]
    union: JsonObject = one if len(others) == 1 and isinstance(one, dict) else {"anyOf": others}
    return union | {"nullable": True} if len(others) < len(parts) else union
