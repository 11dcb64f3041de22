"""Marks that keep something out of the loss, in the words of the tools that wrote them.

    {"role": "assistant", "content": "…", "train": false}       axolotl; also `training`
    {"role": "assistant", "content": "…", "loss": false}        ms-swift
    {"role": "assistant", "content": "…", "weight": 0}          OpenAI
    {"role": "assistant", "content": "…", "exclude_from_loss": true}
    {…, "train_detail": [{"begin_offset": 0, "end_offset": 9, "train": false}, …]}      axolotl: refused, it is finer

A message is trained or it is not; a mark that wants something finer, or that can be read in two ways, is refused by
name, so that nothing is trained which a row wants left out.
"""

import functools
import re
from collections import Counter
from typing import Any

from gemma_dist.data.strict import get, short, without_nulls
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

WEIGHT, WEIGHTS = "weight", (1e-6, 1e6)  # of a row: the key, and the least and the most that it may be
# On a message: true (1) trains it, false (0) does not.
ON_MESSAGE = (
    *("train", "training", "trainable", "loss", "weight", "weights", "loss_weight", "is_train", "is_trainable"),
    *("is_trained", "should_train", "do_train", "train_on_turn", "compute_loss", "use_loss", "calculate_loss"),
)
# The other way round: true (1) keeps it out of the loss.
OFF_MESSAGE = ("exclude_from_loss", "exclude_from_training", "no_loss", "ignore_loss", "skip_loss", "no_train")
_MARKS = (*ON_MESSAGE, *OFF_MESSAGE)
# Marks of characters or tokens, or words for either of two opposite things.
UNCLEAR = ("train_detail", "training_detail", "mask", "masked", "loss_mask", "loss_scale", "label_mask", "train_mask")
# What each of them is where it trains everything, alone or as every item of a list. Others can be read in two ways.
_TRAINS_ALL = {"masked": 0, "loss_mask": 1, "train_mask": 1, "loss_scale": 1}
# Any other key with such a word, and numbers in it that may keep something out, is taken for a mark nobody here knows.
_LIKE_MARK = re.compile(r"(?:^|_)(?:train(?:ed|ing|able)?|loss(?:es)?|(?:un)?mask(?:s|ed|ing)?|weights?)(?:_|$)")
_IS_COUNT = re.compile(r"^(?:n|num|count|total|attention)_")  # num_loss_tokens, attention_mask
# One value of such a name tells of a run, a file or a person: train_idx, eval_loss, pii_masked, train_on_inputs.
_IS_FACT = re.compile(
    r"^(?:val|validation|eval|test|pii|body)_|_(?:ids?|idx|index|steps?|epochs?|tokens|split|time|on_inputs?|on_prompt)$"
    r"|(?:^|_)(?:assistant|completion|responses?)_only(?:_|$)"  # which holds of every row
)
_IS_METRIC = re.compile(r"(?:^|_)(?:train|training|avg|mean|final)_loss$")
_IS_SPLIT = re.compile(r"(?:is_)?(?:used_)?in_train(?:ing)?(?:_set)?")  # of a row
# Such a name picks some turns, or weighs: train_last_turn, mask_until, sample_weight.
_IS_FINER = re.compile(r"(?:^|_)(?:from|after|until|since|first|last|only|start|end|turns?)(?:_|$)")
_WEIGHS = re.compile(r"(?:^|_)(?:sample|example|row|message|token|loss)_(?:weights?|factor)$")
_TURNS_IT_AROUND = re.compile(
    r"(?:^|_)(?:no|not|un|non|ignored?|excluded?|skip|skipped|drop|dropped|without|mask(?:ed|ing)|masks?(?=_))(?=_|$)"
)
_IS_MASK = re.compile(r"(?:^|_)masks?$")  # 1 is what is trained, or what is not
ON_OTHERS = "marks that train a message of someone else than the assistant were passed over"


def is_trained(message: RawRow) -> bool:
    """Whether an assistant's message is trained by its own marks; it is where it has none.

    Raises:
        DataError: a mark is neither true nor false, two of them disagree, or it marks something finer.
    """
    given = {} if message.keys().isdisjoint(_MARKS) else without_nulls({key: message.get(key) for key in _MARKS})
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


@functools.lru_cache(maxsize=4096)
def snake_case(key: str) -> str:
    """lossMask -> loss_mask"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()


def refuse_unclear(marked: RawRow, of_row: bool = False) -> None:
    """DataError for a mark that cannot be carried out, unless it is empty or trains everything."""
    for key in UNCLEAR if not marked.keys().isdisjoint(UNCLEAR) else ():
        value = marked.get(key)
        if value is not None and not _trains_all(key, value):
            raise DataError(
                f"`{key}` is {short(value)}, which cannot be carried out: a message is trained as a whole or not at "
                "all; remove it and write train: true or train: false on the message"
            )
    for key, value in marked.items():
        if _is_like_mark(str(key), value, of_row):
            renamed = f"call it {WEIGHT}, " if of_row and _WEIGHS.search(snake_case(str(key))) else ""
            raise DataError(
                f"`{key}` is {short(value)}, which may be a mark for the loss, but is not known: {renamed}write train: "
                "true or train: false on the message, or remove it"
            )


def _trains_all(key: str, value: object) -> bool:
    """Whether one of UNCLEAR leaves nothing out: "loss_mask" with [1, 1], "masked" with false."""
    values = value if isinstance(value, list) else [value]
    if key.endswith("_detail"):
        return isinstance(value, list) and all(map(_trains, values))
    return not values or all(key in _TRAINS_ALL and item == _TRAINS_ALL[key] for item in values)


def _is_like_mark(key: str, value: object, of_row: bool) -> bool:
    """Whether a key that is not known sounds like a mark, and its value could be one that does not train everything."""
    if not _sounds_like_mark(key):
        return False
    name = snake_case(key)
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, (bool, int, float)) for item in values):
        return False
    if not isinstance(value, list) and _is_fact(name, value, of_row):
        return False
    if _IS_FINER.search(name):
        return True
    is_turned = len(_TURNS_IT_AROUND.findall(name)) % 2 == 1  # not_masked is turned twice
    is_one = all(item == 1 for item in values)
    if _IS_MASK.search(name):
        return is_turned or not (is_one and isinstance(value, list))
    if is_turned:
        return any(item != 0 for item in values)
    is_large = all(item > 1 for item in values) and not _WEIGHS.search(name)  # a count or an amount
    return not (is_one or is_large)


@functools.lru_cache(maxsize=4096)
def _sounds_like_mark(key: str) -> bool:
    """Whether a key that is not known has the name of a mark."""
    name = snake_case(key)
    is_known = key in (*ON_MESSAGE, *OFF_MESSAGE, *UNCLEAR)
    return not is_known and _LIKE_MARK.search(name) is not None and not _IS_COUNT.search(name)


def _is_fact(name: str, value: object, of_row: bool) -> bool:
    """Whether a single number tells of something else than of what is trained: 1.2 of train_loss, 5 of train_step."""
    is_metric = isinstance(value, float) and _IS_METRIC.search(name)
    is_split = of_row and _IS_SPLIT.fullmatch(name)
    return bool(_IS_FACT.search(name) or is_metric or is_split)


def _trains(entry: object) -> bool:
    """Whether an entry of axolotl's `train_detail`, {"begin_offset": 0, "end_offset": 9, "train": true}, trains."""
    return get(entry, "train") in (True, 1)


def _mark_against(marked: RawRow) -> str:
    """The first known key that says more than that it is trained: "weight" of {"weight": 0.5}; "" if none."""
    if marked.keys().isdisjoint(_MARKS):
        return ""
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


def weight_of_row(row: RawRow) -> float:
    """What the loss of a row is multiplied by: its `weight`, as Fireworks AI calls it; 1 where it has none. DataError
    for one that is no number in WEIGHTS."""
    value = row.get(WEIGHT)
    if value is None:
        return 1.0
    least, most = WEIGHTS
    if isinstance(value, (bool, int, float)) and least <= value <= most:
        return float(value)
    raise DataError(
        f"`weight` of the row is {short(value)}; the loss of a row is multiplied by it, so write a number from "
        f"{least:g} to {most:,.0f}, or remove the row if it should train nothing"
    )


def refuse_on_row(row: RawRow) -> None:
    """DataError for a mark on the whole row that keeps it out of the loss, or weighs it in other words."""
    marked = {key: value for key, value in row.items() if key != WEIGHT and not _is_column(key, value)}
    key = _mark_against(marked)
    if key:
        raise DataError(
            f"`{key}` of the row is {short(row[key])}; a row is trained once or left out: remove the row, write "
            "train: false on its messages, or give it a `weight` by which its loss is multiplied"
        )
    refuse_unclear(marked, of_row=True)


def _is_column(key: str, value: object) -> bool:
    """Whether a row's value is no mark, but a split or what a run measured: "train" of `train`, 0.31 of `loss`."""
    is_split = key in ("train", "training") and value in ("train", "training")
    is_measured = key == "loss" and isinstance(value, float) and value not in (0, 1)
    return is_split or is_measured


def note_others(message: RawRow, notes: Counter[str]) -> None:
    """Count a mark that would train what the model never says."""
    given = message.keys() & ON_MESSAGE
    if any(message[key] in (1, True) for key in given):
        notes[ON_OTHERS] += 1
