"""Chat templates other than a model's own: by the name of a revision, or a file."""

from pathlib import Path

from gemma_dist.errors import ConfigError

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
    import trl

    shipped = {path.stem: path for path in (Path(trl.__file__).parent / "chat_templates").glob("gemma4*.jinja")}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(
            f"the chat_template {name!r} is neither a file nor one of {', '.join(sorted(shipped))}; check the path, or "
            "name one of these"
        )
    return path.read_text(encoding="utf-8")
