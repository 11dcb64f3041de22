"""Kinds of target tokens: what a reader would say of a row, and what a step's loss is of each."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma_dist.config import EncodingConfig, RowConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.data.kinds import ARGUMENT, CALLS, KINDS, REASONING, TEXT
from gemma_dist.data.trajectory import parse_row
from gemma_dist.stream.collate import Sample, collate, collate_packs, control_ids
from gemma_dist.train import feed
from gemma_dist.train.sums import StepSums, summarize

CALL = {"function": {"name": "draw", "arguments": {"city": "Rome", "days": [1, 2]}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Draw {it}."},
    {"role": "assistant", "content": None, "reasoning_content": "Is it {due}?", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "draw", "content": "a chart"},
    {"role": "tool", "name": "draw", "content": "another"},
    {"role": "assistant", "content": "A dip in {May}."},
]
ARGUMENTS = "<|tool_call>call:draw{", 'city:<|"|>Rome<|"|>,days:[1,2]', "}<tool_call|>"


@pytest.fixture(scope="module")
def encoder(tiny_model: Callable[..., Path]) -> Encoder:
    return load_encoder(str(tiny_model()), EncodingConfig(chat_template="gemma4_v4"))


def pieces(encoder: Encoder, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What is trained, in pieces of one kind."""
    encoded = encoder.encode(parse_row({"messages": messages}, "rows.jsonl:1", RowConfig()))
    assert len(encoded.kinds) == len(encoded.input_ids)
    assert [kind != 0 for kind in encoded.kinds] == [label != IGNORE_INDEX for label in encoded.labels]
    groups = groupby(zip(encoded.kinds, encoded.input_ids, strict=True), key=lambda pair: pair[0])
    found = [(kind, [token for _, token in group]) for kind, group in groups]
    return [(KINDS[kind], encoder.tokenizer.decode(tokens)) for kind, tokens in found if kind]


def test_each_token_is_of_the_kind_that_a_reader_sees(encoder: Encoder) -> None:
    begin, inside, end = ARGUMENTS
    assert pieces(encoder, MESSAGES) == [
        ("reasoning", "<|channel>thought\nIs it {due}?\n<channel|>"),
        ("call", begin),
        ("argument", inside),
        ("call", end + begin),
        ("argument", inside),
        ("call", end + "<|tool_response>"),
        ("text", "A dip in {May}.<turn|>"),
    ]


def test_a_call_without_arguments_has_none(encoder: Encoder) -> None:
    call = {"function": {"name": "now", "arguments": {}}}
    found = pieces(encoder, [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert found == [("call", "<|tool_call>call:now{}<tool_call|><|tool_response>")]


def test_a_thought_that_the_prompt_has_opened_ends_as_reasoning(tiny_model: Callable[..., Path]) -> None:
    """gemma4_v5, behind a tool's result with thinking on: the model writes the end of a thought, then its answer."""
    encoder = load_encoder(str(tiny_model()), EncodingConfig(chat_template="gemma4_v5", enable_thinking=True))
    assert pieces(encoder, MESSAGES)[-2:] == [("reasoning", "<channel|>"), ("text", "A dip in {May}.<turn|>")]


def test_kinds_stay_beside_their_labels_in_rows_and_packs(encoder: Encoder) -> None:
    """Through padding, packs and the shift by one, to the targets that the head scores."""
    ids = control_ids(encoder.processor)
    samples = [
        Sample("", encoder.encode(parse_row({"messages": messages}, "rows.jsonl:1", RowConfig())), {})
        for messages in (MESSAGES, [MESSAGES[0], MESSAGES[-1]])
    ]
    expected = [
        (label, kind)
        for sample in samples
        for label, kind in zip(sample.encoded.labels, sample.encoded.kinds, strict=True)
        if kind
    ]
    for batch in (collate(samples, ids), collate_packs([samples], ids)):
        assert batch["kinds"].dtype == torch.uint8
        assert torch.equal(batch["kinds"] != 0, batch["labels"] != IGNORE_INDEX)
        known = feed.known_to_host(batch)
        targets = zip(known[feed.IDS].tolist(), known[feed.KINDS].tolist(), strict=True)
        assert list(targets) == expected
        behind = batch["input_ids"].flatten()[known[feed.POSITIONS] + 1]  # each is predicted on the token before
        assert torch.equal(behind, known[feed.IDS])


def test_the_loss_is_that_of_its_kinds() -> None:
    """Of two micro-batches, one of them without a target, in two steps."""
    sums = StepSums(torch.device("cpu"))
    kinds = torch.tensor([TEXT, CALLS, ARGUMENT, ARGUMENT, TEXT], dtype=torch.uint8)
    log_probs = -torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    steps = []
    for factor in (1, 3):
        for chosen in (slice(None), slice(0)):
            scored = SimpleNamespace(
                log_probs=factor * log_probs[chosen],
                entropy=torch.ones(5)[chosen],
                is_top1=torch.tensor([True, False, False, False, True])[chosen],
            )
            sums.add(-scored.log_probs.sum() / 5, scored, kinds[chosen])
        steps.append(sums.exchange(torch.tensor(2.0)))
    assert steps[0].target_tokens == 5
    assert steps[0].grad_norm == 2
    assert steps[0].loss * 5 == pytest.approx(sum(steps[0].nll_of_kinds))
    assert f"loss_{KINDS[REASONING]}" not in summarize(steps)
    assert summarize(steps) == pytest.approx(
        {
            "loss": 2 * 18 / 5,
            "loss_text": 2 * 4.0,
            "loss_call": 2 * 2.0,
            "loss_argument": 2 * 4.0,
            "entropy": 1.0,
            "token_accuracy": 0.4,
        }
    )
