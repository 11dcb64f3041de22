"""Text as a person gets to see it, on a terminal, in a log or in a report, whoever wrote it.

Rows, models, servers and files hold any text: escapes that retitle a window or erase what was said, marks that turn the
order of letters around, signs that nobody sees, addresses with a password in them. Text passes through `shown` at the
few doors where it leaves: the formatter of the logs, `options.say`, and what prints an error.
"""

import json
import logging
import re
from typing import Any

# Controls, formats, halves of surrogate pairs, ends of lines that are none elsewhere (Unicode's Cc, Cf, Cs, Zl and Zp),
# and whatever else is meant to be invisible (Default_Ignorable_Code_Point of UAX #44): among them marks that turn text
# around, and tag characters.
HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# What joins letters of many scripts, and signs to one emoji. Elsewhere it is as invisible as the others.
_JOINS = "\u200c\u200d\ufe00-\ufe0f"
_CANNOT_BE_JOINED = rf'(?:\A|(?<=[\x00-"$-)+-/:-\x7f{HIDDEN}{_JOINS}]))'  # 0-9, # and * are keys: 1️⃣
_UNSEEN = re.compile(rf"[{HIDDEN}]|{_CANNOT_BE_JOINED}(?:[\u200c\ufe00-\ufe0f]|(?<!\ufe0f)\u200d)")
_IN_JSON = re.compile(rf"[{HIDDEN}]")

# `user:password@` of an address, also where the password holds a slash and is no URL's any more. A port is none.
_USER = re.compile(r'://(?:[^\s/?#"<>`]{0,4096}@|[^\s/?#:@\[]{1,256}:(?!\d+(?:[/?#\s]|$))[^\s@"\'`]{1,256}@)')
# What stands in the query of a signed address: X-Amz-Signature, sig, AWSAccessKeyId, access_token …
_SIGNED = re.compile(
    r"([?&;][\w.~%-]{0,64}?(?:sig|token|key|secret|passw|pwd|cred|auth|accessid|session)[\w.~%-]{0,64}=)"
    r"[^\s&;#\"'<>`]+",
    re.IGNORECASE,
)


def shown(text: str) -> str:
    """A text for a person: credentials in it are masked, and nothing in it is hidden or acts."""
    return visible(masked(text))


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Text with each sign that a terminal or a browser would act on, or that nobody would see, written out: `\\x1b` for
    an escape, `\\u202e` for a mark that turns text around.

    Args:
        keep: which of the line feed and the tab stay as they are.
    """
    text = _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    for sign, written in (("\n", "\\n"), ("\t", "\\t")):
        if sign not in keep:
            text = text.replace(sign, written)
    return text


def visible_json(text: str) -> str:
    """JSON of the same value in which no sign is hidden: `\\u202e` in its strings. Joined letters stay as they are."""
    return _IN_JSON.sub(lambda found: json.dumps(found[0])[1:-1], text)


def masked(text: str) -> str:
    """Text with `***` in the place of each password, token and signature in an address."""
    return _SIGNED.sub(r"\1***", _USER.sub("://***@", text)) if "://" in text else text


def masked_in(value: Any) -> Any:
    """A JSON value with the same in its strings: what is written down of a run, and compared with a later one, whose
    credentials may be others."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_in(item) for key, item in value.items()}
    return [masked_in(item) for item in value] if isinstance(value, list) else value


class ShownFormatter(logging.Formatter):
    """Of messages for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, and its traceback, as `shown` has them."""
        return shown(super().format(record))
