"""What a step waits for, counted: in a micro-batch neither for the device nor for another rank, at its end once."""

from pathlib import Path
from typing import Any

import pytest

from gemma_dist.data.kinds import KINDS
from gemma_dist.errors import DataError
from gemma_dist.train.sums import Totals, require_counted, summarize
from tests.support.ranks import long
from tests.support.steps import Counting, measure, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows, of which some have images."""
    folder = tmp_path_factory.mktemp("waits")
    prepare(folder, "e4b")
    return folder


@pytest.mark.parametrize(("launch", "packing"), [("single", False), ("cpu_ddp", True)])
def test_a_micro_batch_waits_for_nothing_and_a_step_exchanges_once(folder: Path, launch: str, packing: bool) -> None:
    found = measure(folder, Counting(launch, packing=packing))
    micro_batch, end = found["micro_batch"], found["end"]
    assert micro_batch["waits"] == {}
    assert micro_batch["collectives"] == {}
    assert end["collectives"] == ({} if launch == "single" else {"gemma_dist": 1})
    assert end["bytes"].get("gemma_dist", 0) == (0 if launch == "single" else 15 * 8), "15 numbers of float64"
    assert end["waits"] == {"gemma_dist": 1}  # the exchange is read


@long
def test_trl_is_seen_to_wait(folder: Path) -> None:
    """So the counts above can fail."""
    micro_batch: dict[str, Any] = measure(folder, Counting("cpu_ddp", packing=True, bare=True))["micro_batch"]
    assert micro_batch["waits"]["trl"] >= 5
    assert micro_batch["collectives"]["accelerate"] == 4  # and DDP's of buffers, in the first one of a step


def test_several_steps_are_shown_by_their_tokens() -> None:
    steps = [_totals(2.0, 10, 5.0, 1.0), _totals(4.0, 30, 5.0, 9.0)]
    assert summarize(steps) == {"loss": 3.0, "loss_text": 0.0, "entropy": 0.25, "token_accuracy": 0.25}
    assert summarize([_totals(0.0, 0, 0.0, 0.0)]) == {"loss": 0.0, "entropy": 0.0, "token_accuracy": 0.0}


def test_labels_that_the_shards_did_not_count_stop_the_run() -> None:
    totals = _totals(2.0, 10, 5.0, 1.0)
    require_counted(0, totals, 10)
    with pytest.raises(DataError, match=r"step 3 has 10 target tokens, and data.train counts 12"):
        require_counted(2, totals, 12)


def _totals(loss: float, tokens: int, entropy: float, num_correct: float) -> Totals:
    """Of a step whose tokens are text."""
    return Totals(loss, entropy, num_correct, [0.0] * len(KINDS), [tokens, 0, 0, 0], grad_norm=1.0, is_finite=True)
