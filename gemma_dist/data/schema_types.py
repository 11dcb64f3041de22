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
from gemma_dist.data.strict import as_object, get, short, without
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
    """The schema with `required: true` of its properties in its own list of required ones.

    {"properties": {"a": {"type": "string", "required": true}, "b": {"required": false}}}
        ->  {"properties": {"a": {"type": "string"}, "b": {}}, "required": ["a"]}
    """
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return schema
    lifted: JsonObject = {}
    names = list(required)
    for name, value in properties.items():
        flag = get(value, "required")
        lifted[name] = without(as_object(value), "required") if isinstance(flag, bool) else value
        if flag is True and name not in names:
            names.append(name)
    changed = schema | {"properties": lifted}
    return changed | {"required": names} if names else changed


def _with_json_type(schema: JsonObject) -> JsonObject:
    """The schema with its type, or each of a list of types, as JSON schema's; without one where it is any.

    {"type": "List[int]", "description": "Days"} -> {"type": "array", "items": {"type": "integer"}, "description": …}
    """
    given = schema.get("type")
    rest = without(schema, "type")
    if isinstance(given, str) and given not in JSON_TYPES:
        return parse_type(given) | rest
    if isinstance(given, list):
        types = [_simple_type(name) if isinstance(name, str) else name for name in given]
        if "any" in types:
            return rest
        return schema | {"type": types[0] if len(types) == 1 else types}
    return schema


def is_optional(type_name: object) -> bool:
    """Whether a type says that its parameter may be left out: `int, optional`, `Optional[int]`."""
    if not isinstance(type_name, str):
        return False
    return _without_optional(type_name) != type_name.strip() or type_name.strip().lower().startswith("optional[")


def _without_optional(type_name: str) -> str:
    """`int` of `int, optional` (Google's and NumPy's docstrings), and of `int`."""
    name, comma, behind = type_name.strip().rpartition(",")
    is_marked = comma != "" and behind.strip().lower() == "optional"
    return name.strip() if is_marked else type_name.strip()


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
    """The type of JSON schema, or "any", that one word stands for: "integer" of "int". DataError where none."""
    found = TYPES.get(name.strip().lower())
    if found is None:
        raise _unknown(name)
    return found


def _unknown(type_name: str) -> DataError:
    """The error for a type that nobody knows."""
    return DataError(
        f"{short(type_name)} is no type; write one of {', '.join(JSON_TYPES)}, or leave the type out where any value "
        "is right"
    )


def _typed(name: str) -> JsonObject:
    """{"type": "string"} for string; {} for any."""
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
    """The schema for `Name[inside]`: {"type": "object", "additionalProperties": {"type": "integer"}} of Dict[str, int].

    Args:
        name: in lower case.
    """
    if name == "literal":
        return {"enum": [_literal(node) for node in inside]}
    if name == "tuple":
        return _tuple(inside)
    if name in ("union", "optional"):
        null: list[JsonObject] = [{"type": "null"}] if name == "optional" else []
        return _union([*map(_from_python, inside), *null])
    kind = _simple_type(name)
    if kind == "array":
        return {"type": "array", "items": _from_python(inside[0])}
    if kind == "object":
        return {"type": "object", "additionalProperties": _from_python(inside[-1])}
    if kind == "any":
        return {}
    raise _unknown(name)


def _literal(node: ast.expr) -> Json:
    """The value in Literal["C", "F"]: a string, a number, true, false or None."""
    value = ast.literal_eval(node)
    if value is None or isinstance(value, str | int | float):
        return value
    raise _unknown(ast.unparse(node))


def _tuple(inside: list[ast.expr]) -> JsonObject:
    """The schema for a tuple: `Tuple[int, ...]` has any length, `Tuple[int, str]` a fixed one.

    Tuple[int, ...]   {"type": "array", "items": {"type": "integer"}}
    Tuple[int, int]   {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    Tuple[int, str]   {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, …}
    """
    last = inside[-1]
    if isinstance(last, ast.Constant) and last.value is ...:
        return {"type": "array", "items": _from_python(inside[0])}
    parts: list[Json] = [*map(_from_python, inside)]
    is_uniform = parts == [parts[0]] * len(parts)
    inner: JsonObject = {"items": parts[0]} if is_uniform else {"prefixItems": parts}
    return {"type": "array", **inner, "minItems": len(parts), "maxItems": len(parts)}


def _union(parts: list[JsonObject]) -> JsonObject:
    """Any of the parts; null becomes `nullable`, which Gemma's template shows.

    int | str | None -> {"anyOf": [{"type": "integer"}, {"type": "string"}], "nullable": true}
    """
    others = [part for part in parts if part != {"type": "null"}]
    if {} in others or not others:
        return {}
    union: JsonObject = others[0] if len(others) == 1 else {"anyOf": [*others]}
    return union | {"nullable": True} if len(others) < len(parts) else union
