"""Chat templates: other ones than a model's own, by the name of a revision or a file, which may be a GGUF; and how
each is rendered.

A template is a program that comes with a model, so transformers lets it run in Jinja's sandbox, which looks at each
attribute and call: a third of the time that rendering takes. The revisions that TRL ships are no programs of strangers,
and need none. All others are rendered in a process with limits (`strange_template.py`), and compared with the newest.
"""

import functools
import hashlib
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_dist import world
from gemma_dist.data import newest
from gemma_dist.data.bounded import Bounded, OverLimitError, RefusedError
from gemma_dist.data.gguf import is_gguf, read_metadata
from gemma_dist.data.shared import of_shared
from gemma_dist.data.strange_template import bounded_render
from gemma_dist.data.types import Tool
from gemma_dist.errors import ConfigError, setting
from gemma_dist.logs import log
from gemma_dist.model.tiny import newest_template, shipped_templates

if TYPE_CHECKING:
    from jinja2 import Template

LOST_OPENING = (
    "the model's own chat template opens an empty thought in front of each answer while thinking is off, and the one "
    "that was given does not: answers are trained without it, as the result's own folder will prompt for them, but a "
    "server that takes the model's template will prompt with it. Leave chat_template out to keep the model's own"
)


def read_template(name: str) -> str:
    """A revision that TRL ships, by its name (`gemma4_v5`), a Jinja file, or the template within a GGUF file.

    Raises:
        ConfigError: it is none of these.
    """
    shipped = shipped_templates()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(
            f"the chat_template {name!r} is neither a file nor one of {', '.join(sorted(shipped))}; check the path, or "
            "name one of these"
        )
    return template_of_gguf(path) if is_gguf(path) else path.read_text(encoding="utf-8")


def template_of_gguf(path: Path) -> str:
    """The chat template that llama.cpp takes from a GGUF file.

    Raises:
        ConfigError: it has none, or is damaged.
    """
    template = read_metadata(path).get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise ConfigError(
            f"{path} holds no tokenizer.chat_template; convert the model again from a folder with chat_template.jinja"
        )
    return template


def revision_of(template: str) -> str:
    """Which of the known templates this is, in words for a report."""
    for name, path in shipped_templates().items():
        if template.strip() == path.read_text(encoding="utf-8").strip():
            return f"{name}, that of E2B and E4B" if name == "gemma4_v5" else f"{name}, an earlier revision"
    if template.strip() == newest_template("31b").strip():
        return "gemma4_v5 as 12B, 26B-A4B and 31B have it, which opens an empty thought where thinking is off"
    return f"none of the revisions that are known here (sha256 {_sha256(template)})"


@dataclass(frozen=True)
class KnownTemplate:
    """A template that TRL ships, compiled as transformers does but for the sandbox."""

    jinja: "Template"
    declare: Callable[[Tool], str]  # a tool, by the template's own macro: once, since rows share their tools
    opens_empty_thought: bool | None  # of one that `newest.py` writes, else None

    def render(self, variables: dict[str, Any]) -> str:
        """The text, in Python where that is sure to be Jinja's."""
        if self.opens_empty_thought is not None and not newest.OTHER_NAMES & variables.keys():
            with suppress(newest.NotPlainError, KeyError, TypeError, AttributeError):
                return newest.conversation(
                    variables["messages"],
                    [self.declare(tool) for tool in variables["tools"] or ()],
                    bos=variables.get("bos_token", ""),
                    thinking=variables["enable_thinking"],
                    prompts=variables["add_generation_prompt"],
                    opens_empty_thought=self.opens_empty_thought,
                )
        return self.jinja.render(**variables)


@functools.cache
def known_template(text: str) -> KnownTemplate | None:
    """The template of a text, if it is one of those that TRL ships, or that of the large models."""
    from jinja2 import Environment
    from jinja2.runtime import Context

    known = [path.read_text(encoding="utf-8") for path in shipped_templates().values()]
    if text not in [*known, newest_template("31b")]:
        return None

    class PlainContext(Context):
        """Calls as Python does: these templates call nothing that asks for the context."""

        def call(self, called: Any, *given: Any, _loop_vars: Any = None, _block_vars: Any = None, **named: Any) -> Any:
            return called(*given, **named)

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.context_class = PlainContext
    macros: Any = environment.from_string(text).make_module({"messages": [{"role": "user", "content": ""}]})
    opens_empty_thought = newest.opens_empty_thought(text)

    @of_shared
    def declare(tool: Tool) -> str:
        if opens_empty_thought is not None:
            with suppress(newest.NotPlainError, KeyError, TypeError, AttributeError):
                return newest.declaration(tool)
        return str(macros.format_function_declaration(tool))

    environment.globals["declaration"] = declare
    compiled = environment.from_string(text.replace("format_function_declaration(tool)", "declaration(tool)"))
    return KnownTemplate(compiled, declare, opens_empty_thought)


@functools.cache
def newest_known() -> str:
    """The newest known template, to compare others with: of a whole conversation that of all models makes the same."""
    return newest_template("e4b")


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of any template. Raises whatever the template does, RefusedError where it goes over a limit."""
    known = known_template(template)
    if known is not None:
        return known.render(variables)
    try:
        return str(_strange()(template, variables))
    except OverLimitError as error:
        raise OverLimitError(f"{error} (the template with the sha256 {_sha256(template)})") from None


@functools.cache
def say_if_unknown(template: str) -> None:
    """Warn of a template that is none of the known revisions, once; of several processes one speaks.

    Raises:
        ConfigError: Jinja cannot read it.
    """
    if known_template(template) is not None:
        return
    try:
        _strange()(template, None)
    except RefusedError as error:
        raise ConfigError(
            f"the chat template (sha256 {_sha256(template)}) is none that Jinja reads: {error}. Mend it, or use that "
            f"of E2B and E4B by {setting('chat_template', 'gemma4_v5')}"
        ) from None
    if world.rank() == 0 and multiprocessing.parent_process() is None:
        log.warning(
            "the chat template is none of the revisions that are known here (sha256 %s). It is run within limits, what "
            "it makes of each row is compared with the row, and what it adds is counted: `gemma-dist inspect` shows it",
            _sha256(template),
        )


@functools.cache
def _strange() -> Bounded:
    return bounded_render()


def _sha256(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()
