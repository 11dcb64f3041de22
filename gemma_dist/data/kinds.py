"""What the tokens are that a model learns to write: reasoning, text, a call, or its arguments.

    <|channel>thought\\nIs it due?\\n<channel|>                   reasoning
    A dip in May.<turn|>                                        text
    <|tool_call>call:draw{ … }<tool_call|><|tool_response>      call: that one is made, and of what
                          …                                     argument: what stands between its braces

A token that holds the end of one and the beginning of another is of the kind that it begins with.
"""

import re

from gemma_dist.gemma_format import CALL, CALL_END, CHANNEL, CHANNEL_END, RESPONSE

TEXT, REASONING, CALLS, ARGUMENT = 1, 2, 3, 4  # 0: not trained
KINDS = {TEXT: "text", REASONING: "reasoning", CALLS: "call", ARGUMENT: "argument"}

_THOUGHT = re.compile(rf"\A.*?{re.escape(CHANNEL_END)}", re.DOTALL)  # the prompt may have opened it
_CALL = re.compile(
    rf"{re.escape(CALL)}call:[^{{]*{{(?P<arguments>.*?)}}?{re.escape(CALL_END)}(?:{re.escape(RESPONSE)})?", re.DOTALL
)


def kinds_of_characters(text: str, spans: list[tuple[int, int]]) -> bytearray:
    """The kind of each character of a rendered trajectory, 0 outside of the `spans` [start, end) that are trained.

    One more follows the last character, for tokens without any.
    """
    kinds = bytearray(len(text) + 1)
    for start, end in spans:
        kinds[start:end] = bytes([TEXT]) * (end - start)
        written = text[start:end]
        if CHANNEL_END in written:
            thought = _THOUGHT.match(written)
            assert thought is not None
            _mark(kinds, start + max(0, written.find(CHANNEL, 0, thought.end())), start + thought.end(), REASONING)
        for call in _CALL.finditer(written):
            _mark(kinds, start + call.start(), start + call.end(), CALLS)
            _mark(kinds, start + call.start("arguments"), start + call.end("arguments"), ARGUMENT)
    return kinds


def _mark(kinds: bytearray, start: int, end: int, kind: int) -> None:
    kinds[start:end] = bytes([kind]) * (end - start)
