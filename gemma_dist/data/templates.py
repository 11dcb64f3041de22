"""Chat templates: other ones than a model's own, by the name of a revision or a file; and those that need no sandbox.

A template is a program that comes with a model, so transformers lets it run in Jinja's sandbox, which looks at each
attribute and call: a third of the time that rendering takes. The revisions that TRL ships are no programs of strangers.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_dist.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

LOST_OPENING = (
    "the model's own chat template opens an empty thought in front of each answer while thinking is off, and the one "
    "that was given does not: answers are trained without it, as the result's own folder will prompt for them, but a "
    "server that takes the model's template will prompt with it. Leave chat_template out to keep the model's own"
)


def read_template(name: str) -> str:
    """A revision that TRL ships, by its name (`gemma4_v5`), or a Jinja file.

    Raises:
        ConfigError: it is neither.
    """
    shipped = _shipped()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(
            f"the chat_template {name!r} is neither a file nor one of {', '.join(sorted(shipped))}; check the path, or "
            "name one of these"
        )
    return path.read_text(encoding="utf-8")


@functools.cache
def without_sandbox(text: str) -> "Template | None":
    """A template of TRL's, compiled as transformers does but for the sandbox; None for any other."""
    from jinja2 import Environment

    if text not in [path.read_text(encoding="utf-8") for path in _shipped().values()]:
        return None
    return Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)


def _shipped() -> dict[str, Path]:
    """Gemma 4's templates in TRL, by name."""
    import trl

    return {path.stem: path for path in (Path(trl.__file__).parent / "chat_templates").glob("gemma4*.jinja")}
