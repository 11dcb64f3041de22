"""Whether a text says an accepted answer: its words one after the other, numbers within a tolerance.

"It is about 20.0 °C in Rome." says "20 °C", and, at a relative tolerance of 0.01, "20.1 °c". It does not say "0 °C".
"""

import math
import re
import unicodedata
from collections.abc import Sequence

# A number with thousands separators, a point and an exponent; else a word; else one sign that is no blank and no
# punctuation ("°", "€").
_TOKEN = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?|\w+|[^\s\w!-/:-@\[-`{-~]|[%$+#&]", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d")


def says_one_of(text: str, answers: Sequence[str], tolerance: float) -> bool:
    """Whether the text says one of the answers.

    Args:
        tolerance: how far a number may be from the answer's, as a share of the answer's.
    """
    words = _tokens(text)
    return any(_holds(words, _tokens(answer), tolerance) for answer in answers)


def _tokens(text: str) -> list[str | float]:
    """Words in lower case and numbers by value: "Rome: 1,200.50 EUR" -> ["rome", 1200.5, "eur"]."""
    found = _TOKEN.findall(unicodedata.normalize("NFC", text).casefold())
    return [float(token.replace(",", "")) if _NUMBER.match(token) else token for token in found]


def _holds(words: list[str | float], answer: list[str | float], tolerance: float) -> bool:
    """Whether the answer's tokens stand in a row somewhere. An answer of punctuation alone is said nowhere."""
    starts = range(len(words) - len(answer) + 1) if answer else ()
    return any(all(_agree(words[start + i], token, tolerance) for i, token in enumerate(answer)) for start in starts)


def _agree(word: str | float, token: str | float, tolerance: float) -> bool:
    if isinstance(word, float) and isinstance(token, float):
        return math.isclose(word, token, rel_tol=0, abs_tol=tolerance * abs(token)) or word == token
    return word == token
