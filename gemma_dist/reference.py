"""docs/configuration.md, from the fields of the settings and the options of the commands.

`python -m gemma_dist.reference` writes it, run from the repository's root, and a test holds it.
"""

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gemma_dist.cli import cli
from gemma_dist.config import RunConfig, Section, option
from gemma_dist.config_data import SourceConfig
from gemma_dist.options import SettingsCommand, word
from gemma_dist.recipe import SECTIONS

PAGE = Path("docs/configuration.md")
INTRODUCTION = """\
# Configuration reference

Made from the code by `python -m gemma_dist.reference`; a test fails when it is stale.

A recipe (`launch/*.yaml`) has the sections `model`, `data`, `train`, `lora` and `quantization`, and `tuning`, which
stands alone. On the command line of `check`, `plan`, `batches` and `train` each is `key=value`, with its section
(`train.learning_rate=1e-4`) or without it where the name is the only one (`learning_rate=1e-4`). The settings of other
commands are options. Names are Hugging Face's wherever one exists; [what other tools call them](coming_from.md)."""

SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
ESCAPED = r"\|"  # in a table's cell
KINDS = {"int": "integer", "float": "number", "str": "text", "bool": "true, false", "Path": "path"}


def page() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION, "## Recipes", "### tuning", _table({"tuning": RunConfig.model_fields["tuning"]}, "{}")]
    for name, section in SECTIONS.items():
        parts += [f"### {name}", _sentence(section), _table(section.model_fields, name + ".{}")]
    parts += ["### A source of data.train", _sentence(SourceConfig), _table(SourceConfig.model_fields, "{}")]
    parts += ["## Commands", *_commands()]
    return "\n\n".join(parts) + "\n"


def _sentence(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().partition("\n\n")[0].replace("\n    ", " ")


def _commands() -> Iterator[str]:
    """A table for each command, and one of settings that several have."""
    shared: dict[str, type[Section]] = {}
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=f"gemma-dist {name}")
        own = [param for param in command.params if isinstance(param, click.Option)]
        sections = command.sections.values() if isinstance(command, SettingsCommand) else ()
        yield f"### {name}"
        yield (command.help or "").strip().partition("\n")[0]
        yield f"    {' '.join([context.command_path, *command.collect_usage_pieces(context)])}"
        rows = [_option_row(one) for one in own]
        for section in sections:
            for kind in _with_fields(section):
                if kind.__name__ in ("RowConfig", "EncodingConfig", "ShardConfig"):
                    shared[kind.__name__] = kind
                else:
                    rows += [_row(option(name), kind.model_fields[name]) for name in _own_fields(kind)]
        if rows:
            yield _lines(rows)
        named = [kind.__name__ for section in sections for kind in _with_fields(section) if kind.__name__ in shared]
        if named:
            yield "And those of " + ", ".join(f"[{TITLES[one]}](#{_anchor(TITLES[one])})" for one in named) + "."
    for one, title in TITLES.items():
        kind = shared[one]
        yield f"### {title}"
        yield _lines([_row(option(name), kind.model_fields[name]) for name in _own_fields(kind)])


TITLES = {
    "ShardConfig": "Options of length",
    "RowConfig": "Options of rows",
    "EncodingConfig": "Options of the template",
}


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _with_fields(section: type[Section]) -> Iterator[type[Section]]:
    """A class of settings and those that it inherits from, where they have settings of their own."""
    for kind in section.__mro__:
        if issubclass(kind, Section) and _own_fields(kind):
            yield kind


def _own_fields(kind: type[Section]) -> list[str]:
    return [name for name in kind.model_fields if name in inspect.get_annotations(kind)]


# ---- rows ------------------------------------------------------------------------------------------------------------


def _table(fields: dict[str, FieldInfo], spelled: str) -> str:
    return _lines([_row(spelled.format(name), field) for name, field in fields.items()])


def _lines(rows: list[tuple[str, str, str, str]]) -> str:
    head = ["| name | values | default | what it is |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(cell.replace('|', ESCAPED) for cell in row)} |" for row in rows)])


def _row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """A setting: its name, what it may be, its default, its sentence."""
    limits = [(SIGNS[sign], getattr(rule, sign)) for rule in field.metadata for sign in SIGNS if hasattr(rule, sign)]
    values = " ".join([_kind(field.annotation), *(f"{sign} {limit:,}" for sign, limit in limits)])
    return f"`{name}`", values, _default(field), field.description or ""


def _kind(annotation: Any) -> str:
    """The values of a type, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{word(value)}`" for value in inner)
    if origin in (types.UnionType, Union):
        return " or ".join(dict.fromkeys(_kind(one) for one in inner if one is not type(None)))
    if origin is list:
        return "list"
    if origin is dict:
        return "mapping"
    name = getattr(annotation, "__name__", str(annotation))
    return KINDS.get(name, "mapping" if isinstance(annotation, type) and issubclass(annotation, Section) else name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "see there" if "default:" in (field.description or "") else "must be given"
    if field.default is PydanticUndefined or field.default is None or field.default in ([], ""):
        return ""
    return f"`{word(field.default)}`"


def _option_row(one: click.Option) -> tuple[str, str, str, str]:
    """An option of a command alone."""
    kind = one.type
    values = "" if one.is_flag else one.metavar or kind.name
    if isinstance(kind, click.Choice):
        values = ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange) and kind.min is not None:
        values += f" ≥ {kind.min}"
    default = "must be given" if one.required else ""
    if one.show_default and one.default is not None:
        default = f"`{one.default}`"
    return f"`{one.opts[0]}`", values, default, one.help or ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
