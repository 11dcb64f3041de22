"""Calls in the syntax of other models, read: what stands inside of their markers, into {"name", "arguments"}.

    {"name": "f", "arguments": {"a": 1}}    JSON or a Python literal, one, several or a list (Hermes, Llama, Mistral)
    {"name": "f", "arguments": '{"a": 1}'}  glaive
    [f(a=1), g()]                           Python (ToolACE, Gemma 3)
    <function=f><parameter=a>1</parameter></function>                Qwen Coder; Llama writes JSON inside
    <invoke name="f"><parameter name="a">1</parameter></invoke>      Claude
    f<arg_key>a</arg_key><arg_value>1</arg_value>                    GLM
    <f><a>1</a></f>                                                  Cline

Nothing is ever run. What the XML forms write is text: the tool's schema says what is a number.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from gemma_dist.data.call_markers import WRAPPERS
from gemma_dist.data.layouts.turns import first_filled
from gemma_dist.data.literals import parse_calls, parse_literal, parse_python, read_literal
from gemma_dist.data.strict import as_object, error_context, get, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# The declared tools: name -> the schemas of its arguments by their names.
Signatures: TypeAlias = Mapping[str, Mapping[str, object]]

_GLAIVE = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^<>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\s]+)>(.*?)</parameter>", re.DOTALL)
_INVOKE = re.compile(r"""<invoke\s+name\s*=\s*["']([^"'<>]+)["']\s*>(.*?)</invoke>""", re.DOTALL)
_INVOKE_PARAMETER = re.compile(r"""<parameter\s+name\s*=\s*["']([^"'<>]+)["']\s*>(.*?)</parameter>""", re.DOTALL)
_GLM = re.compile(r"([\w./:-]+)\s*((?:<arg_key>.*?</arg_value>\s*)*)", re.DOTALL)
_GLM_PARAMETER = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_CLINE_PARAMETER = re.compile(r"<([\w.-]+)>(.*?)</\1>", re.DOTALL)
# What a comma does not count in, and what opens and closes.
_PYTHON_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[\[({]|[\])}]|,''',
    re.DOTALL,
)
BLANKS = re.compile(r"\s+")
_BETWEEN_VALUES = re.compile(r"[ \t\r\n;]+")
_LINE_END = re.compile(r"[ \t]*\n")
_PYTHON_CALL = re.compile(r"""\s*([^()\[\]{}'",=]+?)\s*\((.*)\)\s*""", re.DOTALL)
_PYTHON_ARGUMENT = re.compile(r"""\s*([^\s=,()\[\]{}'"]+)\s*=(?!=)(.*)""", re.DOTALL)


class TextBesideCalls(DataError):
    """Something else than a call stands among the calls or behind them."""


def signatures_of(tools: object) -> dict[str, Mapping[str, object]]:
    """Names and arguments of declarations in any form: OpenAI's, MCP's, flat, JSON text of one or of all of them."""
    signatures: dict[str, Mapping[str, object]] = {}
    for tool in _declarations(tools):
        function = get(tool, "function") or tool
        name = get(function, "name")
        schema = first_filled(function, "parameters", "input_schema", "inputSchema")
        if name and isinstance(name, str):
            signatures[name] = as_object(get(schema, "properties") or schema)
    return signatures


def any_of(signatures: Signatures) -> str:
    """A pattern for the names of the declared tools; for any name where none are declared."""
    return "|".join(map(re.escape, sorted(signatures))) or r"[\w./:-]+"


def _declarations(tools: object) -> list[object]:
    """The declarations one by one. What cannot be read is for the check of the declarations to refuse."""
    try:
        given = read_literal(tools)
        listed = given if isinstance(given, list) else [given]
        return [read_literal(tool) for tool in listed]
    except DataError:
        return []


def read_calls(text: str, signatures: Signatures) -> list[dict[str, Any]]:
    """The calls that `text` writes in any of the forms, as OpenAI's `tool_calls`.

    Raises:
        DataError: it writes something else, too, or what has no single meaning.
    """
    text = text.strip()
    if text.startswith("<function="):
        return [_xml_call(*call, _PARAMETER, signatures) for call in _all(_FUNCTION, text)]
    if text.startswith("<invoke"):
        return [_xml_call(*call, _INVOKE_PARAMETER, signatures) for call in _all(_INVOKE, text)]
    if "<arg_key>" in text:
        return [_xml_call(*call, _GLM_PARAMETER, signatures) for call in _all(_GLM, text)]
    if text.startswith("<"):
        cline = re.compile(rf"<({any_of(signatures)})>(.*?)</\1>", re.DOTALL)
        return [_xml_call(*call, _CLINE_PARAMETER, signatures) for call in _all(cline, text)]
    if text.startswith("{") or re.match(r"\[\s*[{\]]", text):
        return _json_calls(text)
    return list(_python_calls(text, signatures))


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_calls(text: str) -> list[dict[str, Any]]:
    """Calls as JSON or Python literals, several with nothing, a blank or `;` between."""
    glaive = _GLAIVE.fullmatch(text)
    if glaive:
        name, arguments = glaive.groups()
        return parse_calls({"name": name, "arguments": parse_json(arguments.replace("\\'", "'"))}, from_text=True)
    calls = []
    for value in json_values(text) or [parse_literal(text)]:
        if isinstance(value, dict) and len(value) == 1:
            value = first_filled(value, *WRAPPERS) or value
        calls += parse_calls(value, from_text=True)
    return calls


def json_values(text: str) -> list[object]:
    """The values of JSON texts one behind the other: '{"a": 1}\\n{"b": 2}'. Empty where the text is something else."""
    decoder = json.JSONDecoder()
    values: list[object] = []
    position = 0
    while position < len(text):
        try:
            _, end = decoder.raw_decode(text, position)
            values.append(parse_json(text[position:end]))
        except (ValueError, RecursionError):
            return []
        position = skip(_BETWEEN_VALUES, text, end)
    return values


def skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Where a text goes on behind what `pattern` finds at a position; the position itself where it finds nothing."""
    match = pattern.match(text, position)
    return match.end() if match else position


# ---- XML -------------------------------------------------------------------------------------------------------------


def _all(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """What `pattern` finds from the front of the text to its end, with nothing but blanks between."""
    found = []
    position = 0
    while text[position:].strip():
        match = pattern.match(text, position)
        if match is None:
            raise TextBesideCalls(f"{short(text[position:])} is no call in the form of the others")
        found.append((match[1], match[2]))
        position = skip(BLANKS, text, match.end())
    return found


def _xml_call(name: str, body: str, parameter: re.Pattern[str], signatures: Signatures) -> dict[str, Any]:
    """The call of a tool whose arguments stand in tags, or as JSON."""
    with error_context(f"call of {name}"):
        if body.lstrip().startswith("{"):
            return parse_calls({"name": name, "arguments": parse_literal(body)}, from_text=True)[0]
        schemas = signatures.get(name, {})
        arguments: RawRow = {}
        for key, text in _all(parameter, body.strip()):
            if key in arguments:
                raise DataError(f"the argument {short(key)} stands twice; remove one of the two")
            arguments[key] = _typed(key, text, schemas.get(key))
    return parse_calls({"name": name, "arguments": arguments}, from_text=True)[0]


def _typed(key: str, text: str, schema: object) -> object:
    """The value that the text of an argument stands for: text where the schema says so or nothing else can be meant."""
    text = text.removeprefix("\n").removesuffix("\n")
    types = get(schema, "type")
    if types in ("string", "str"):
        return text
    try:
        value = parse_literal(text)
    except DataError:
        return text
    if not isinstance(types, str):
        raise DataError(
            f"the argument {short(key)} is {short(text)}, and no declaration says whether that is text; "
            "declare its type"
        )
    return value


# ---- Python ----------------------------------------------------------------------------------------------------------


def _python_calls(text: str, signatures: Signatures) -> Iterator[dict[str, Any]]:
    """The calls of `[f(a=1), g()]`, of lines of calls, and of `print(f(a=1))`."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    for written in _split(text):
        call = _PYTHON_CALL.fullmatch(written)
        if call is None:
            raise DataError(f"{short(written)} is no call of the form name(argument=value)")
        name, body = call[1], call[2]
        if name == "print" and name not in signatures:
            yield from _python_calls(body, signatures)
            continue
        bare_name = name.removeprefix("default_api.")
        if bare_name in signatures:
            name = bare_name
        with error_context(f"call of {name}"):
            arguments = _python_arguments(body)
        yield from parse_calls({"name": name, "arguments": arguments}, from_text=True)


def _python_arguments(text: str) -> RawRow:
    """'a=1, b="x"' -> {"a": 1, "b": "x"}. DataError for an argument without its name, or of another's."""
    arguments: RawRow = {}
    for written in _split(text):
        argument = _PYTHON_ARGUMENT.fullmatch(written)
        if argument is None:
            raise DataError(f"the argument {short(written)} is written without its name; write name=value")
        key = argument[1]
        if key in arguments:
            raise DataError(f"the argument {short(key)} stands twice; remove one of the two")
        with error_context(f"argument {key}"):
            arguments[key] = parse_python(argument[2])
    return arguments


def _split(text: str) -> list[str]:
    """The pieces of `text` between the commas, and the line breaks behind calls, that no string or bracket holds."""
    pieces = []
    start = depth = 0
    for token in _PYTHON_TOKEN.finditer(text):
        if token[0] in "[({":
            depth += 1
        elif token[0] in "])}":
            depth -= 1
            ends_line = _LINE_END.match(text, token.end())
            if depth == 0 and token[0] == ")" and ends_line:
                pieces.append(text[start : token.end()])
                start = ends_line.end()
        elif token[0] == "," and depth == 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    pieces.append(text[start:])
    return [piece for piece in pieces if piece.strip()]
