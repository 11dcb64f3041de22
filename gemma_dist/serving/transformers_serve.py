"""`transformers serve`, knowing the calls of every Gemma 4: `python -m gemma_dist.serving.transformers_serve MODEL …`.

transformers 5.23 knows how `gemma4` writes calls, not that 12B (`gemma4_unified`) writes them so, too; and it reads
names of letters, digits and _ alone, so that a call of `my-tool` ends in error 500. Both are mended here, in its own
table. A `response_template` in the model's tokenizer_config.json goes first, as there.
"""

import copy
import re
import sys
from typing import Any

from gemma_dist.gemma_format import CALL
from gemma_dist.model.towers import UNIFIED

ANY_NAME = re.escape(f"{CALL}call:") + r"(?P<name>[^{]+)(?=\{)"


def know_calls() -> None:
    """Let transformers' server read the calls of all of the family, whatever the tools are named."""
    from transformers.cli.serving import utils

    table: dict[Any, dict[str, Any]] = utils._RESPONSE_TEMPLATE_FALLBACKS
    known = copy.deepcopy(table[("gemma4",)])
    known["fields"]["tool_calls"]["open_pattern"] = ANY_NAME
    table[("gemma4",)] = table[(UNIFIED,)] = known


def main() -> None:
    """Serve, without the question to the package index whether there is a newer version."""
    from transformers.cli.transformers import app

    know_calls()
    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
