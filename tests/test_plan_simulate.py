"""The simulated memory of a step is that of a real one, on tiny runs of every kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_dist.plan.depth import Depth
from gemma_dist.plan.simulate import simulate
from gemma_dist.recipe import load_config
from tests.support.memory import CELLS, TILE, compare, write_shards
from tests.support.ranks import long

TOLERANCE = 0.02
# Four that together have all that the others have, the cheaper ones first; `benchmarks/memory.py` has the whole table.
CHEAP = ("full, packed, images", "QLoRA, packed, bfloat16, images")
LONG = ("26b: QLoRA, experts in 4 bits", "12b: LoRA, packed, images")


@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=long) for name in LONG)])
def test_the_peak_of_a_step_is_what_was_simulated(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    cell = CELLS[name]
    model = tiny_model(cell.style, cell.dtype)
    shards = write_shards(tmp_path / "corpus", model, images=cell.images)
    result = compare(cell, model, shards, tmp_path / "out")
    assert abs(result.error) < TOLERANCE, (result.measured, result.simulated)
    assert sum(result.simulated.parts.values()) == result.simulated.peak_bytes


@pytest.mark.parametrize(("style", "depth"), [pytest.param("e2b", Depth(8, 8), marks=long), ("31b", Depth(16, 0))])
def test_the_line_through_small_depths_ends_where_all_layers_do(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, depth: Depth
) -> None:
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
    settings = [f"model_name_or_path={tiny_model(style)}", "data.train=none", "model.dtype=bfloat16", "packing=true"]
    recipe = Path(__file__).parents[1] / "launch/cpu_qlora.yaml"
    more = ["bnb_4bit_compute_dtype=bfloat16", "gradient_checkpointing=true", "per_device_train_batch_size=1"]
    config = depth.config_of(load_config(recipe, [*settings, *more]), tmp_path)
    line, all_layers = (simulate(config, num_tokens=512, every_layer=every) for every in (False, True))
    assert line.peak_bytes == pytest.approx(all_layers.peak_bytes, rel=0.005)
    assert line.moment == all_layers.moment
    assert line.parts.keys() == all_layers.parts.keys()
