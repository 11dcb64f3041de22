"""The text that is trained, made to have in front of each answer what a server puts there: the generation prompt.

An answer is what a server asks for at once: a trained assistant message, or several in a row. The generation prompt in
front of it may open more than a turn of the model, which the conversation does not show later:

    opening                        where                                            what the model then writes
    (nothing)                      most templates and places                        its answer
    <|channel>thought\\n           gemma4_v5: behind a tool's result, thinking on    the rest of a thought, its answer
    <|channel>thought\\n<channel|>  large models: behind a user, thinking off         its answer

An answer with a thought of its own stands behind an opened thought already; the opening is then the prompt's, and not
trained. Without one, the last answer gets an empty thought, of which the model writes the end. An earlier one cannot
get it, since a server shows later answers a history without it: it is not trained, and counted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from gemma_dist.data.emitted import Emitted
from gemma_dist.data.types import Message
from gemma_dist.errors import setting
from gemma_dist.gemma_format import CHANNEL_END, THOUGHT

NO_THOUGHT = THOUGHT + CHANNEL_END

UNTRAINED = (
    "answers to a tool's result that have no thought, or lose it, are not trained where the prompt has opened one: use "
    f"{setting('unroll', 'reasoning')}, which makes a sample of each"
)
CLOSED_BY_MODEL = "answers to a tool's result without a thought learn to close the one that the prompt has opened"
CLOSED_BY_PROMPT = "answers stand behind the empty thought of this template's prompts with thinking off"
SHOWN_LATER = (
    "of these empty thoughts stand in front of later answers too, to which a server does not show them: use "
    f"{setting('unroll', 'reasoning')}, which makes a sample of each"
)
THINKS_WHILE_OFF = (
    "messages train a thought while thinking is off, which no server asks for: use "
    f"{setting('enable_thinking', 'auto')}, or remove the row's chat_template_kwargs"
)


@dataclass
class Served:
    """A rendered trajectory with the openings of the generation prompts in it."""

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of the characters that are trained
    starts: list[tuple[int, int]] = field(default_factory=list)  # of each trained answer: index, end of its prompt
    notes: Counter[str] = field(default_factory=Counter)  # what was added or left out: how often


def trained_answers(messages: list[Message]) -> list[list[int]]:
    """The indices of the trained assistant messages of each answer."""
    answers = []
    for is_trained, group in groupby(range(len(messages)), key=lambda index: is_target(messages[index])):
        if is_trained:
            answers.append(list(group))
    return answers


def is_target(message: Message) -> bool:
    """Whether an assistant wrote the message and it is trained."""
    return message["role"] == "assistant" and message.get("train", True)


def opening_of(prompt: str) -> str:
    """What a generation prompt opens at its end."""
    for opening in (NO_THOUGHT, THOUGHT):
        if prompt.endswith(opening):
            return opening
    return ""


def as_served(
    rendered: str, emitted: Emitted, messages: list[Message], openings: Mapping[str, str], *, thinking: bool
) -> Served:
    """The rendered trajectory as it is trained.

    Args:
        openings: what generation prompts open, by the role of the message in front of them.
    """
    served = Served()
    answers = trained_answers(messages)
    copied = 0
    for answer in answers:
        first = answer[0]
        spans = [span for span in emitted.spans if span.message_index in answer]
        if not spans:
            continue
        start = emitted.starts[first]
        opening = openings.get(messages[first - 1]["role"], "")
        if opening == THOUGHT and first not in emitted.with_reasoning:
            if answer is not answers[-1]:
                served.notes[UNTRAINED] += 1
                continue
            served.notes[CLOSED_BY_MODEL] += 1
            added = NO_THOUGHT
        elif opening == NO_THOUGHT and first not in emitted.with_reasoning and not rendered.endswith(opening, 0, start):
            served.notes[CLOSED_BY_PROMPT] += 1
            if answer is not answers[-1]:
                served.notes[SHOWN_LATER] += 1
            added = NO_THOUGHT
        else:
            added = ""
        is_open = bool(added) or opening == THOUGHT
        served.text += rendered[copied:start]
        copied = start
        end_of_prompt = len(served.text) + len(opening) * is_open
        served.starts.append((first, end_of_prompt))
        served.text += added
        shift = len(served.text) - copied
        if added:
            served.spans.append((end_of_prompt, len(served.text)))
        for span in spans:
            served.spans.append((max(span.start + shift, end_of_prompt), span.end + shift))
    served.text += rendered[copied:]
    num_thoughts = sum(is_target(messages[index]) for index in emitted.with_reasoning)
    if num_thoughts and not thinking:
        served.notes[THINKS_WHILE_OFF] += num_thoughts
    return served


def decision_points(messages: list[Message]) -> Iterator[tuple[int, list[Message]]]:
    """Index and messages of each assistant turn that is trained as a whole; assistant messages in a row are one."""
    for is_model, group in groupby(enumerate(messages), key=lambda pair: pair[1]["role"] == "assistant"):
        turn = list(group)
        if is_model and all(message.get("train", True) for _, message in turn):
            yield turn[0][0], [message for _, message in turn]
