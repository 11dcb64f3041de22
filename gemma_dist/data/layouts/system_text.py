"""Declarations that a system message lists as text, and the instructions of other formats around them.

    "You are kind. You are provided with function signatures within <tools></tools> XML tags:\\n<tools>[…]</tools>"
      ->  tools […], text "You are kind."

Gemma's prompt declares the tools itself, and an instruction to write calls in `<tool_call>` would train against what is
trained. Only sentences that the public formats use verbatim are removed; whatever else the message says stays.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_dist.data.literals import parse_literal
from gemma_dist.data.strict import get
from gemma_dist.errors import DataError

_OPENER = re.compile(r"<(tools|AVAILABLE_TOOLS)>")
_BRACKETS = re.compile(r"""([{\[][\s\[{]*+)("?)""")  # where JSON of objects may begin: a key follows
_MAX_READ = 50_000_000  # characters, of JSON that is no list of tools
# What announces a list of declarations that stands in no tags.
_ANNOUNCED = re.compile(
    r"access to the following functions|functions in JSON format that you can invoke|given the following functions",
    re.IGNORECASE,
)
# A word or two that only name the list behind them.
_LABEL = re.compile(
    r"(?:\A|(?<=\n))[ \t]*(?:#+ *)?(?:[\w ]{0,30}\b)?(?:funcs?|functions|tools|apis):?\s*\Z", re.IGNORECASE
)
_EXAMPLE = r"<tool_call>\s*\{[^{}]*<[\w -]+>[^{}]*\}\s*</tool_call>"
# A blank stands for any blanks.
_INSTRUCTIONS = (
    # Hermes, Qwen
    r"# Tools (?=You may call one or more functions|You have access to the following functions)",
    r"You are provided with function signatures within <tools>\s*</tools>(?: XML tags)?[.:]?",
    r"Here are the available tools:",
    r"Use the following pydantic model json schema for each tool call you will make:",
    r"For each function call,? return a json object,? with (?:the )?function name and arguments within "
    r"<tool_call>\s*</tool_call>(?: XML)? tags(?: with the following schema| as follows)?[.:]?",
    r"For each function call,? return a json object, with the following pydantic model json schema(?: for each)?[.:]?",
    r"Each function call should be enclosed within <tool_call>\s*</tool_call> XML tags\.?",
    _EXAMPLE,
    # Qwen Coder
    r"You have access to the following functions:",
    r"If you choose to call a function ONLY reply in the following format with NO suffix: "
    r"<tool_call>.*?</tool_call>(?: <IMPORTANT>.*?</IMPORTANT>)?",
    # ToolACE
    r"You should only return the function calls? in (?:the )?tools? calls? sections?\.",
    r"If you decide to invoke any of the function\(s\), you MUST put it in the format of \[[^\]]*\]\.?",
    r"You SHOULD NOT include any other text in the response\.",
    r"Here is a list of functions in JSON format that you can invoke[.:]?",
    r"Should you decide to return the function call\(s\)[.,]?(?: Put it in the format of \[[^\]]*\]\.?)?",
    r"NO other text MUST be included\.",
    # Nemotron
    r"You can use the following tools to assist the user if required:",
    r"If you decide to call any tool\(s\), use the following format: <TOOLCALL>.*?</TOOLCALL>",
    r"The user will execute tool-calls and return responses from tool\(s\) in this format: "
    r"<TOOL_RESPONSE>.*?</TOOL_RESPONSE>",
    # Llama
    r"Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    r"best answers the given prompt\.",
    r"Respond in the format \{\"name\": function name, \"parameters\": dictionary of argument name and its value\}\.?"
    r"(?: ?Do not use variables\.)?",
)
_SENTENCES = "|".join(_INSTRUCTIONS).replace(" ", r"\s+")
_INSTRUCTION = re.compile(rf"(?:{_SENTENCES})[ \t]*", re.IGNORECASE | re.DOTALL)
_GLAIVE = re.compile(r"\s+with access to the following functions\.\s+Use them if required[ :-]*", re.IGNORECASE)
_BRACES = re.compile(r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}")  # with the pydantic model that Hermes prints


@dataclass(frozen=True)
class Listing:
    """Declarations in a text."""

    start: int
    end: int
    tools: list[object]
    is_announced: bool  # as one of the public formats does


def find_listing(text: str) -> Listing | None:
    """The declarations that a system text lists; None where there are none.

    Raises:
        DataError: `<tools>` holds something that cannot be read.
    """
    for start, body, end in _tagged(text):
        tools = _tagged_declarations(body)
        if tools:
            return Listing(start, end, tools, is_announced=True)
    if '"name"' not in text:
        return None
    tools, start, end = [], 0, 0
    for opening, value, value_end in _json_values(text):
        if opening < end:
            continue
        if tools and text[end:opening].strip(" \t\r\n,;"):
            break
        values = _listed(value)
        if values and all(map(_is_declaration, values)):
            start = start if tools else opening
            end = value_end
            tools += values
    if not tools:
        return None
    return Listing(start, end, tools, is_announced=bool(_ANNOUNCED.search(text[:start])))


def _tagged(text: str) -> Iterator[tuple[int, str, int]]:
    """What stands between two tags of declarations, behind where the first begins and before where the last ends."""
    opener = _OPENER.search(text)
    while opener:
        closer = f"</{opener[1]}>"
        end = text.find(closer, opener.end())
        if end < 0:
            return
        yield opener.start(), text[opener.end() : end], end + len(closer)
        opener = _OPENER.search(text, end)


def _json_values(text: str) -> Iterator[tuple[int, object, int]]:
    """Each JSON value of objects in a text, also inside of another one, with where it begins and ends.

    Brackets without their counterpart are passed over, until that has cost too much for a text that lists tools.
    """
    decoder = json.JSONDecoder()
    num_read = 0
    for run in _BRACKETS.finditer(text):
        for start in range(run.start(1), run.end(1)):
            if text[start] not in "{[" or not run[2]:
                continue
            try:
                value, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                num_read += error.pos  # the error counts the lines before it
            except (ValueError, RecursionError):
                return
            else:
                num_read += end - start
                yield start, value, end
            if num_read > _MAX_READ:
                return


def _tagged_declarations(text: str) -> list[object]:
    """The declarations between two tags: a list, or one a line."""
    if not text.strip().startswith(("{", "[")):
        return []
    try:
        return _listed(parse_literal(text))
    except DataError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise DataError(f"the declarations in <tools>: {error}; write them under `tools`") from None
    return [parse_literal(line) for line in lines]


def _listed(value: object) -> list[object]:
    """A list as it is; any other value in a list of its own."""
    return value if isinstance(value, list) else [value]


def _is_declaration(value: object) -> bool:
    """Whether a value declares a tool, and is no example of a call."""
    function = get(value, "function") or value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    has_schema = any(isinstance(get(function, key), dict) for key in ("parameters", "input_schema", "inputSchema"))
    return has_schema or (get(value, "type") == "function" and "description" in function)


def without_listing(text: str, listing: Listing) -> str:
    """The text without the declarations and the words that only announce them."""
    before = _LABEL.sub("", text[: listing.start])
    after = text[listing.end :].removeprefix(".")
    return without_instructions(before.rstrip() + "\n" + after.lstrip())


def without_instructions(text: str) -> str:
    """The text without the sentences with which the public formats say how to write calls."""
    text = _BRACES.sub(lambda braces: "" if "FunctionCall" in braces[0] else braces[0], text)
    text = _GLAIVE.sub(".", text)
    text = _INSTRUCTION.sub("", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
