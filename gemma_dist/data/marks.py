"""Marks that keep something out of the loss, in the words of the tools that wrote them.

    {"role": "assistant", "content": "…", "train": false}       axolotl; also `training`
    {"role": "assistant", "content": "…", "loss": false}        ms-swift
    {"role": "assistant", "content": "…", "weight": 0}          OpenAI
    {"role": "assistant", "content": "…", "exclude_from_loss": true}
    {…, "train_detail": [{"begin_offset": 0, "end_offset": 9, "train": false}, …]}      axolotl: refused, it is finer

A message is trained or it is not; a mark that wants something finer, or that can be read in two ways, is refused by
name, so that nothing is trained which a row wants left out.
"""

import re
from collections import Counter

from gemma_dist.data.strict import get, short, without_nulls
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# On a message: true (1) trains it, false (0) does not.
ON_MESSAGE = (
    *("train", "training", "trainable", "loss", "weight", "weights", "loss_weight", "is_train", "is_trainable"),
    *("is_trained", "should_train", "do_train", "train_on_turn", "compute_loss", "use_loss", "calculate_loss"),
)
# The other way round: true (1) keeps it out of the loss.
OFF_MESSAGE = ("exclude_from_loss", "exclude_from_training", "no_loss", "ignore_loss", "skip_loss", "no_train")
# Marks of characters or tokens, or words for either of two opposite things.
UNCLEAR = ("train_detail", "training_detail", "mask", "masked", "loss_mask", "loss_scale", "label_mask", "train_mask")
# Any other key with such a word, and more than `true` in it, is taken for a mark that nobody here knows.
_LIKE_MARK = re.compile(r"(?:^|_)(?:train(?:ed|ing|able)?|loss(?:es)?|mask(?:s|ed|ing)?|weights?)(?:_|$)")
_TURNS_IT_AROUND = re.compile(r"(?:^|_)(?:no|not|un|non|ignore|exclude|skip|drop|without|mask\w*)(?:_|$)")
_IS_COUNT = re.compile(r"^(?:n|num|count|total)_")  # num_loss_tokens
ON_OTHERS = "marks that train a message of someone else than the assistant were passed over"


def is_trained(message: RawRow) -> bool:
    """Whether an assistant's message is trained by its own marks; it is where it has none.

    Raises:
        DataError: a mark is neither true nor false, two of them disagree, or it marks something finer.
    """
    given = without_nulls({key: message.get(key) for key in (*ON_MESSAGE, *OFF_MESSAGE)})
    trains: list[bool] = []
    for key, value in given.items():
        if value not in (0, 1):
            yes, no = ("false, 0", "true, 1") if key in OFF_MESSAGE else ("true, 1", "false, 0")
            raise DataError(f"`{key}` is {short(value)}; a message is trained ({yes}) or not ({no})")
        trains.append(value == (key not in OFF_MESSAGE))
    if len(set(trains)) > 1:
        raise DataError(f"{' and '.join(given)} disagree; keep `train`")
    refuse_unclear(message)
    return all(trains)


def refuse_unclear(marked: RawRow) -> None:
    """DataError for a mark that cannot be carried out, unless it is empty or trains everything."""
    for key in UNCLEAR:
        value = marked.get(key)
        is_empty = value is None or value == []
        trains_all = key.endswith("_detail") and isinstance(value, list) and all(map(_trains, value))
        if not is_empty and not trains_all:
            raise DataError(
                f"`{key}` is {short(value)}, which cannot be carried out: a message is trained as a whole or not at "
                "all; remove it and write train: true or train: false on the message"
            )
    for key, value in marked.items():
        if _is_like_mark(str(key), value):
            raise DataError(
                f"`{key}` is {short(value)}, which may be a mark for the loss, but is not known: write train: true or "
                "train: false on the message, or remove it"
            )


def _is_like_mark(key: str, value: object) -> bool:
    """Whether a key that is not known sounds like a mark, and its value could be one that does not train everything."""
    if key in (*ON_MESSAGE, *OFF_MESSAGE, *UNCLEAR):
        return False
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    if not _LIKE_MARK.search(name) or _IS_COUNT.search(name):
        return False
    if value in (True, 1):
        return bool(_TURNS_IT_AROUND.search(name))
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, (bool, int, float)) for item in values)


def _trains(entry: object) -> bool:
    """Whether an entry of axolotl's `train_detail`, {"begin_offset": 0, "end_offset": 9, "train": true}, trains."""
    return get(entry, "train") in (True, 1)


def _mark_against(marked: RawRow) -> str:
    """The first known key that says more than that it is trained: "weight" of {"weight": 0.5}; "" if none."""
    for key in ON_MESSAGE:
        if marked.get(key) not in (None, 1):
            return key
    return next((key for key in OFF_MESSAGE if marked.get(key) not in (None, 0)), "")


def refuse_finer(marked: RawRow, what: str) -> None:
    """DataError for a mark on a part of a message or on a call that keeps it out of the loss.

    Args:
        what: how errors call it: "a part", "a call".
    """
    key = _mark_against(marked)
    if key:
        raise DataError(
            f"`{key}` of {what} is {short(marked[key])}; a message is trained as a whole or not at all: write "
            "train: false on the message, or put what is trained and what is not in messages of their own"
        )
    refuse_unclear(marked)


def refuse_on_row(row: RawRow) -> None:
    """DataError for a mark on the whole row that keeps it out of the loss, or weighs it."""
    key = _mark_against(row)
    if key:
        raise DataError(
            f"`{key}` of the row is {short(row[key])}; a row is trained once or left out: remove the row, write "
            "train: false on its messages, or weigh it with its source in the recipe's data.train"
        )
    refuse_unclear(row)


def note_others(message: RawRow, notes: Counter[str]) -> None:
    """Count a mark that would train what the model never says."""
    if any(message.get(key) in (1, True) for key in ON_MESSAGE):
        notes[ON_OTHERS] += 1
