"""Attributes of a span: the same dotted names whether they are kept flat, nested, as JSON text or as OTLP writes them.

{"llm.input_messages.0.message.role": "user"}
{"llm": {"input_messages": [{"message": {"role": "user"}}]}}
[{"key": "llm.input_messages.0.message.role", "value": {"stringValue": "user"}}]
"""

from gemma_dist.data.calls import first_of
from gemma_dist.data.strict import as_list, as_object, get, get_list, is_json_text, parse_json, short, without_nulls
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

PLACES = ("attributes", "span_attributes", "SpanAttributes")
OTLP_VALUES = ("stringValue", "boolValue", "intValue", "doubleValue", "bytesValue")
DETAILS = "gen_ai.client.inference.operation.details"  # the event that holds the messages where the span does not


def read_attributes(row: RawRow) -> RawRow:
    """The attributes of a span and of its event of DETAILS; those of the row itself where it has none beside it."""
    attributes: RawRow = {}
    for place in PLACES:
        attributes |= _as_object(find(row, place))
    for event in get_list(row, "events"):
        if get(event, "name") == DETAILS:
            attributes |= _as_object(get(event, "attributes"))
    return attributes or row


def find(value: object, name: str) -> object:
    """What stands under a dotted name, also where only names below it are written; None where there is nothing.

    find({"a.b.0.c": 1, "a.b.1.c": 2}, "a.b") -> {"0.c": 1, "1.c": 2}
    """
    if not isinstance(value, dict):
        return None
    if value.get(name) is not None:
        return value[name]
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        inner = value.get(".".join(parts[:length]))
        found = find(inner, ".".join(parts[length:]))
        if found is not None:
            return found
    below: RawRow = {}
    for key, item in without_nulls(value).items():
        if str(key).startswith(name + "."):
            below[key.removeprefix(name + ".")] = item
    return below or None


def find_list(value: object, name: str) -> list[object]:
    """The entries of a list under a dotted name: a list, its JSON text, or names that count them (`0.role`)."""
    found = _read(find(value, name))
    if isinstance(found, list):
        return found
    entries: list[object] = []
    while (entry := find(found, str(len(entries)))) is not None:
        entries.append(entry)
    return entries


def find_text(text: str) -> object:
    """The value of an attribute that is JSON text; None where it is another text."""
    return parse_json(text) if is_json_text(text) else None


def _read(value: object) -> object:
    """What JSON text says; other values as they are."""
    return find_text(value) if isinstance(value, str) else value


def _as_object(attributes: object) -> RawRow:
    """Attributes by their names; none where there is something else.

    [{"key": "llm.model_name", "value": {"stringValue": "m"}}] -> {"llm.model_name": "m"}
    """
    attributes = _read(attributes)
    named = dict(as_object(attributes))
    for entry in as_list(attributes):
        named[str(get(entry, "key"))] = _otlp_value(get(entry, "value"))
    return named


def _otlp_value(value: object) -> object:
    """A value as OTLP's JSON writes it: {"stringValue": ...}, {"arrayValue": {"values": [...]}}."""
    if not isinstance(value, dict):
        return value
    plain = first_of(value, OTLP_VALUES)
    if plain is not None:
        return plain
    if isinstance(value.get("arrayValue"), dict):
        return [_otlp_value(item) for item in get_list(value["arrayValue"], "values")]
    if isinstance(value.get("kvlistValue"), dict):
        return _as_object(get_list(value["kvlistValue"], "values"))
    if value:
        raise DataError(f"the attribute {short(value)} is of a kind that OTLP does not have; mend the export")
    return None
