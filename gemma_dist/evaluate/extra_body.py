"""`--extra-body`: more fields for each request, as a JSON object. It is written to run.json and the reports, so that a
secret has no place in it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from gemma_dist.data.strict import short
from gemma_dist.errors import ConfigError
from gemma_dist.evaluate.client import KEY

# Names of secrets, in lower case and without - and _. Not max_tokens, stop_token_ids or prompt_cache_key.
_SECRET = re.compile(
    r".*(apikey|authorization|password|passwd|secret|bearer|credentials?)|auth|key|token"
    r"|.*(access|auth|api|bearer|hf|id|refresh|security|session|user)(token|key)|.*(private|secret)key"
)


def read_extra_body(text: str | None) -> dict[str, Any]:
    """The fields that the text says, {} for None.

    Raises:
        ConfigError: it is no JSON object, or holds what looks like a secret. No message holds a value of it.
    """
    try:
        fields = json.loads(text or "{}")
        json.dumps(fields, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'--extra-body is not JSON ({error}); write an object, such as {{"top_k": null}}') from None
    if not isinstance(fields, dict):
        raise ConfigError(f'--extra-body is a {type(fields).__name__}; write a JSON object, such as {{"top_k": null}}')
    for name in _secrets(fields):
        raise ConfigError(
            f"--extra-body: {short(name)} looks like a credential, and all of --extra-body is written to reports; put "
            f"the server's key into the environment as {KEY}"
        )
    return fields


def _secrets(value: object) -> Iterator[str]:
    """The keys, at any depth, under which a secret seems to stand. One is a text or a number: under "password" in the
    schema of a tool stands an object."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        is_value = isinstance(inner, (str, int, float)) and not isinstance(inner, bool)
        if is_value and _SECRET.fullmatch(re.sub("[-_ .]", "", name).lower()):
            yield name
        yield from _secrets(inner)
    for item in value if isinstance(value, list) else ():
        yield from _secrets(item)
