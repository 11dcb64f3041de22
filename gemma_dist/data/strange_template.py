"""Render a chat template of strangers, as transformers does it, in a process that `bounded.py` watches.

Jinja's sandbox keeps a template from the machine, not from looping for ever or from building gigabytes.

The environment is that of `transformers.utils.chat_template_utils`: a test compares what both render. It is made here
once more since that module would bring all of transformers, and torch, into a process with little memory.
"""

import functools
import json
import random
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gemma_dist.data.bounded import Bounded

SECONDS = 5  # of processor time; the longest rows take less than one
NUM_BYTES = 2**30
# A rendering may have twice the characters of the row as JSON, and as many more, for words of the template's own.
MAX_CHARACTERS_ADDED = 1_000_000


def bounded_render() -> Bounded:
    """`render` within limits."""
    return Bounded("gemma_dist.data.strange_template:render", seconds=SECONDS, num_bytes=NUM_BYTES)


def render(template: str, variables: dict[str, Any] | None) -> str:
    """A template's text for these variables; empty for None, which asks whether Jinja can read the template. Raises
    what Jinja and the template raise, TemplateError where the text is too long."""
    read = compiled(template)
    if variables is None:
        return ""
    random.seed(0)  # of Jinja's `random` and `lipsum`: what is inspected is what is trained
    limit = 2 * len(json.dumps(variables, ensure_ascii=False)) + MAX_CHARACTERS_ADDED
    return "".join(_at_most(limit, read.generate(**variables)))


def _at_most(limit: int, pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > limit:
            raise TemplateError(f"it writes more than the {limit:,} characters that are allowed for such a row")
        yield piece


@functools.lru_cache(maxsize=4)
def compiled(template: str) -> Template:
    """The template in the environment that transformers gives it. TemplateError, with the line, where it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which mark what a model wrote: the text in them as it is."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_written` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict(…)` without the type itself, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As of `dict`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a name
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _require_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template holds no name such as {name!r}; rename it")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
