"""`import gemma_dist` is light, and offers functions with types that do what the commands do."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gemma_dist
from gemma_dist import api
from gemma_dist.data.read import Reading
from tests.support.corpus import row, shard_rows, write_rows

RECIPE = Path(__file__).parents[1] / "launch" / "cpu_lora.yaml"


def test_the_import_is_light_and_every_name_is_there() -> None:
    code = (
        "import sys, gemma_dist; names = dir(gemma_dist);"
        "print(*sorted({'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)));"
        "print(*(name for name in gemma_dist.__all__ if name not in names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert sorted([*api.__all__, "__version__"]) == sorted(gemma_dist.__all__)
    for name in api.__all__:
        assert getattr(gemma_dist, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gemma_dist.nothing
    assert (Path(gemma_dist.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", ["train", "evaluate", "merge", "resolve"])
def test_a_module_of_a_functions_name_is_both(name: str) -> None:
    module = import_module(f"gemma_dist.{name}")
    assert getattr(gemma_dist, name) is module
    assert inspect.signature(module) == inspect.signature(getattr(api, name))


def test_a_row_is_parsed_and_encoded_and_an_output_read(model: str) -> None:
    trajectory = gemma_dist.parse_row(row(1), "rows.jsonl:7")
    encoded = gemma_dist.load_encoder(model).encode(trajectory)
    assert encoded.num_target_tokens
    with pytest.raises(gemma_dist.GemmaDistError, match=r"^rows.jsonl:7: "):
        gemma_dist.parse_row({"messages": []}, "rows.jsonl:7")
    with pytest.raises(gemma_dist.GemmaDistError, match="max-image-pixels"):
        gemma_dist.parse_row(row(1), max_image_pixels=0)
    reading = gemma_dist.read_output("<|tool_call>call:plot{n:1}<tool_call|>")
    assert isinstance(reading, Reading)
    assert [(call.name, call.arguments) for call in reading.calls] == [("plot", {"n": 1})]


def test_a_run_from_recipe_to_merged_model(model: str, tmp_path: Path) -> None:
    rows = [row(number) for number in range(4)]
    shard_rows(tmp_path, model, rows)
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:1])
    words = [f"model_name_or_path={model}", f"data.train={tmp_path / 'shards'}", f"output_dir={tmp_path / 'adapter'}"]
    config = gemma_dist.load_config(RECIPE, [*words, "max_steps=1", "global_batch_size=4"])
    assert gemma_dist.resolve(config).num_steps == 1
    adapter = gemma_dist.train(config)
    assert adapter == tmp_path / "adapter"
    report = gemma_dist.evaluate(model, held_out, tmp_path / "eval", adapter=adapter, max_new_tokens=4, loss=False)
    assert report["num_trajectories"] == 1
    assert report == json.loads((tmp_path / "eval/report.json").read_text())
    merged = gemma_dist.merge(model, adapter, tmp_path / "merged", verify=True)
    assert "merged" in merged.summary()
    assert (tmp_path / "merged/model.safetensors").exists()
