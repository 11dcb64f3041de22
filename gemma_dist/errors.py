"""User errors. The command line prints them without a traceback and exits with 2.

Every message carries the value that was found, the rule that it breaks and a remedy. `assert` is for our own bugs,
these classes are for the user's data, settings and files.

A remedy names a setting, not an option: the same error may reach a user of Python, of `shard` or of `train`. The
command line spells the setting for the command that prints it.

    DataError(f"remove it or use {setting('control_tokens', 'escape')}")
"""

import re
from collections.abc import Mapping

_SETTING = re.compile(r"`(\w+): ([^`\n]+)`")


def setting(name: str, value: object) -> str:
    """A setting and its value as a message names them: `control_tokens: escape`. A capital FILE or FOLDER as value
    stands for one of the user's."""
    return f"`{name}: {value}`"


def spell(message: str, spellings: Mapping[str, str]) -> str:
    """`message` with each setting of `spellings` written so, the value in place of {}; others are left as they are."""

    def spelled(found: re.Match[str]) -> str:
        """What to write for one setting that `setting` wrote."""
        name, value = found.groups()
        return spellings[name].replace("{}", value) if name in spellings else found[0]

    return _SETTING.sub(spelled, message)


def shortened(text: str) -> str:
    """A text of others for a message, on one line of at most 200 characters: of a longer one, beginning and end."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-70:]}"


def brief(value: object) -> str:
    """A value of others for a message: as Python writes it, `shortened`."""
    return shortened(repr(value))


class GemmaDistError(ValueError):
    """Base of all user errors; anything else that escapes is an internal error (exit code 1)."""


class ConfigError(GemmaDistError):
    """A setting is unknown, contradictory or impossible; the message names its dotted key."""


class DataError(GemmaDistError):
    """A trajectory breaks the data contract; the message names file, line and turn."""


class CheckpointError(GemmaDistError):
    """A model folder, adapter or checkpoint is missing, incomplete or does not fit the run."""


class TrainingError(GemmaDistError):
    """A run stopped: a step's loss or gradient is not finite; the message names the step's samples."""


class EvaluationError(GemmaDistError):
    """Decision points could not be answered; the message names them."""


class PeerError(GemmaDistError):
    """Another rank of this run stopped and says why itself: this one ends without a message."""


class Stopped(Exception):
    """No error: a run stopped as it was asked to, and said so. The same command goes on from there."""
