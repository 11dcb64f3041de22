"""Errors that the user can mend. The command line prints them plainly and exits with 2.

Every message carries the value that was found, the rule that it breaks and a remedy. `assert` is for our own bugs,
these classes are for the user's data, settings and files.
"""


class GemmaDistError(ValueError):
    """Base of everything that the user can mend; anything else that escapes is a bug of ours (exit code 1)."""


class ConfigError(GemmaDistError):
    """A setting is unknown, contradictory or impossible; the message names its dotted key."""


class DataError(GemmaDistError):
    """A trajectory breaks the data contract; the message names file, line and turn."""


class CheckpointError(GemmaDistError):
    """A model folder, adapter or checkpoint is missing, incomplete or does not fit the run."""


class TrainingError(GemmaDistError):
    """A run cannot go on: a step's loss or gradient is not finite; the message names the step's samples."""


class PeerError(GemmaDistError):
    """Another rank of this run cannot go on, and says why itself: this one ends without a word."""
