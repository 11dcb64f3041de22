"""What a run takes of a GPU: the arithmetic against the real modules, the command, and the figures that are printed."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_dist.__main__ import main
from gemma_dist.errors import ConfigError
from gemma_dist.family import SIZES, hub_name, known_config
from gemma_dist.model.shapes import size_by_part
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.plan import table
from gemma_dist.plan.activations import MicroBatch
from gemma_dist.plan.estimate import ACTIVATIONS, GRADIENTS, OPTIMIZER, SCALES, SIMULATED, Estimate, estimate_memory
from gemma_dist.plan.geometry import geometry_of, read_geometry
from gemma_dist.plan.margin import GIB, Margin, parse_memory, read_margin, write_calibration
from gemma_dist.plan.run import Request, make_plan
from gemma_dist.plan.watch import PlanWatch
from gemma_dist.plan.weights import EXPERTS, QUANTIZED, loaded_weights, num_parameters, num_trained, placement
from gemma_dist.plan.workload import workload_of
from gemma_dist.recipe import load_config
from gemma_dist.resolve import Run, resolve
from gemma_dist.topology import Topology, planned_topology
from gemma_dist.train.memory import Gpu, MemorySeen
from tests.support.corpus import row, shard_rows
from tests.support.ranks import long

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "tests" / "shapes"
RECIPES = {path.stem: path for path in sorted((ROOT / "launch").glob("*.yaml"))}
ODD = (("-1", "0.1"), ("1", "-0.1"), ("1", "NaN"), ("1e999", "0.1"))  # context_bytes and fragmentation
GPU_RECIPES = [name for name in RECIPES if not name.startswith("cpu_")]


@pytest.fixture(autouse=True)
def _from_the_root_and_not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """`gemma-dist plan … --json` without shards: its exit code and what it prints."""
    code = main(["plan", *words, table.NO_SHARDS, "--json"])
    return code, json.loads(capsys.readouterr().out)


def estimated(recipe: str, *overrides: str, batch: MicroBatch, topology: Topology | None = None) -> Estimate:
    config = load_config(RECIPES[recipe], overrides)
    place = placement(config, has_images=batch.num_images > 0)
    geometry = read_geometry(config.model.model_name_or_path)
    return estimate_memory(geometry, config, topology or Topology(""), batch, place)


# ---- weights: exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SHAPES.glob("*.json")), ids=lambda path: path.stem)
def test_the_known_sizes_are_those_of_the_true_config(path):
    [size] = [size for size in SIZES if size.lower().startswith(path.stem)]
    config = json.loads(path.read_text())
    for name in (hub_name(size), hub_name(size).removesuffix("-it")):
        known = known_config(name)
        assert known is not None
        assert geometry_of(known, name) == geometry_of(config, path.stem)


def test_no_other_name_is_known():
    assert known_config("google/gemma-4-E4B-it-qat") is None
    assert known_config("E4B") is None
    assert known_config("somebody/gemma-4-E4B-it") is None


@pytest.fixture(scope="module")
def true_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the true config.json of each model."""
    folder = tmp_path_factory.mktemp("true")
    for path in SHAPES.glob("*.json"):
        (folder / path.stem).mkdir()
        shutil.copy(path, folder / path.stem / "config.json")
    return folder


@pytest.mark.parametrize(
    "recipe",
    [
        "e2b_qlora_16gb",
        "e4b_full_zero3_offload",
        "e4b_qlora_16gb",
        "12b_qlora_16gb",
        "26b_lora_zero3",
        "31b_qlora_80gb",
    ],
)
def test_weights_are_counted_as_the_real_modules_have_them(true_models, recipe):
    """Every part of the model together: the towers that a run leaves out are those that it does not count."""
    size = recipe.partition("_")[0]
    config = load_config(RECIPES[recipe], [f"model_name_or_path={true_models / size}"])
    geometry = read_geometry(config.model.model_name_or_path)
    place = dataclasses.replace(placement(config, has_images=True), audio=True)
    real = size_by_part(config, ()).values()
    adapter = num_trained(geometry, config) if config.lora else 0
    assert num_parameters(geometry) + adapter == sum(part.num_parameters for part in real)
    assert num_trained(geometry, config) == sum(part.num_trained for part in real)
    counted = sum(loaded_weights(geometry, config, place).values())
    assert counted == pytest.approx(sum(part.num_bytes + part.host_bytes for part in real), rel=1e-6)


def test_a_tiny_model_is_counted_from_its_saved_config(model):
    config = load_config(RECIPES["cpu_lora"], [f"model_name_or_path={model}", "data.train=nowhere"])
    geometry = read_geometry(model)
    real = size_by_part(config, ()).values()
    assert num_parameters(geometry) + num_trained(geometry, config) == sum(part.num_parameters for part in real)


@pytest.mark.parametrize("has_images", [True, False])
@pytest.mark.parametrize("recipe", ["e4b_qlora_16gb", "e4b_full_zero3_offload"])
def test_the_towers_that_are_counted_are_those_that_are_loaded(recipe, has_images):
    config = load_config(RECIPES[recipe])
    place = placement(config, has_images=has_images)
    left_out = [name for name in ("audio", "vision") if not getattr(place, name)]
    assert left_out == list(unneeded_towers(frozen=config.tuning != "full", has_images=has_images))


# ---- a step ----------------------------------------------------------------------------------------------------------


def test_activations_grow_with_the_tokens_and_not_the_rest():
    at = {tokens: estimated("e4b_qlora_16gb", batch=MicroBatch(tokens)) for tokens in (2048, 4096, 8192)}
    grown = at[4096].parts[ACTIVATIONS] - at[2048].parts[ACTIVATIONS]
    assert at[8192].parts[ACTIVATIONS] - at[4096].parts[ACTIVATIONS] == pytest.approx(2 * grown, rel=1e-3)
    rest = [{k: v for k, v in one.parts.items() if k != ACTIVATIONS} for one in at.values()]
    assert rest[0] == rest[1] == rest[2]


def test_the_peak_is_the_largest_of_all_moments():
    for name in ("e4b_qlora_16gb", "e4b_lora_zero2", "31b_qlora_80gb"):
        one = estimated(name, batch=MicroBatch(4096, num_images=8))
        assert one.peak_bytes == max(one.moments.values()) == one.moments[one.moment]


def test_what_holds_everything_takes_more():
    batch = MicroBatch(4096)
    plain = estimated("e4b_qlora_16gb", batch=batch).peak_bytes
    assert estimated("e4b_qlora_16gb", "gradient_checkpointing=false", batch=batch).peak_bytes > 2 * plain
    assert estimated("e4b_qlora_16gb", "attn_implementation=eager", batch=batch).peak_bytes > plain + GIB // 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_what_its_stage_says(stage):
    batch, name = MicroBatch(2048), "e4b_full_zero3_offload"

    def on(num: int) -> dict[str, int]:
        topology = planned_topology(Path(f"accelerate_configs/zero{stage}.yaml"), num)
        return estimated(name, batch=batch, topology=topology).parts

    two, eight = on(2), on(8)
    assert eight[OPTIMIZER] == pytest.approx(two[OPTIMIZER] / 4, rel=1e-6)
    assert (eight[GRADIENTS] < two[GRADIENTS] / 2) == (stage >= 2)
    assert (eight["token embedding"] == pytest.approx(two["token embedding"] / 4)) == (stage == 3)


def test_offloaded_states_are_in_host_memory():
    topology = planned_topology(Path("accelerate_configs/zero3_offload.yaml"), 8)
    one = estimated("e4b_full_zero3_offload", batch=MicroBatch(4096), topology=topology)
    assert OPTIMIZER not in one.parts
    assert one.host["offloaded by ZeRO"] > 16 * one.num_trained


def test_zero3_divides_4_bit_weights_but_not_their_scales():
    """Nor does a rank hold more while it loads than a step gathers: `tests/test_zero3.py` counts it."""
    one = estimated("31b_qlora_80gb", batch=MicroBatch(1024))

    def on(launch: str) -> dict[str, int]:
        topology = planned_topology(Path(f"accelerate_configs/{launch}.yaml"), 8)
        return estimated("31b_qlora_80gb", batch=MicroBatch(1024), topology=topology).parts

    divided, offloaded = on("zero3"), on("zero3_offload")
    whole = one.parts[QUANTIZED]
    assert divided[QUANTIZED] == pytest.approx(whole / 8, rel=1e-6)
    assert whole / 33 < offloaded[SCALES] < whole / 31, "8 bits for 64 weights of 4 bits, and a little"
    assert divided[SCALES] == pytest.approx(offloaded[SCALES] * 7 / 8, rel=1e-6)
    assert QUANTIZED not in offloaded


@pytest.mark.parametrize("launch", ["ddp", "zero3", "zero3_offload", "fsdp2"])
def test_experts_that_come_from_the_host_take_the_room_of_two_layers_on_every_rank(launch):
    """They are no parameters, so that no launch shares them."""
    one = estimated("26b_qlora", "model.experts=host", batch=MicroBatch(1024))
    topology = planned_topology(Path(f"accelerate_configs/{launch}.yaml"), 8)
    shared = estimated("26b_qlora", "model.experts=host", batch=MicroBatch(1024), topology=topology)
    assert shared.parts[EXPERTS] == one.parts[EXPERTS]


@pytest.fixture(scope="module")
def short_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true models with four layers: of each kind one, and where keys and values are shared one more."""
    folder = tmp_path_factory.mktemp("short")
    for path in SHAPES.glob("*.json"):
        config = json.loads(path.read_text())
        text = config["text_config"]
        text["layer_types"] = ["sliding_attention", "full_attention"] * 2
        text["num_hidden_layers"], text["num_kv_shared_layers"] = 4, 2 if text["num_kv_shared_layers"] else 0
        for tower in ("vision_config", "audio_config"):
            if (config.get(tower) or {}).get("num_hidden_layers"):
                config[tower]["num_hidden_layers"] = 2
        (folder / path.stem).mkdir()
        (folder / path.stem / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("recipe", "num_images", "overrides"),
    [
        ("e4b_qlora_16gb", 0, ["model.ple=gpu"]),
        pytest.param("e4b_qlora_16gb", 0, ["gradient_checkpointing=false"], marks=long),
        ("12b_qlora_16gb", 2, []),
        pytest.param("26b_qlora", 0, [], marks=long),
        ("26b_qlora", 0, ["quantize_moe_experts=false", "lora.target_parameters=[experts.gate_up_proj]"]),
        ("e4b_qlora_16gb", 0, ["activation_offloading=true", "optim=adamw_torch", "per_device_train_batch_size=2"]),
        pytest.param("31b_qlora_80gb", 0, ["activation_offloading=true"], marks=long),
        ("e4b_full_zero3_offload", 0, ["model.dtype=float32", "activation_offloading=false"]),
    ],
)
def test_the_arithmetic_agrees_with_the_simulated_step(short_models, recipe, num_images, overrides):
    """Within 2 %: the simulator runs the real modules, operator by operator."""
    words = [f"model_name_or_path={short_models / recipe.partition('_')[0]}", table.NO_SHARDS, *overrides]
    config = load_config(RECIPES[recipe], words)
    request = Request(num_tokens=2048, num_images=num_images)
    closed_form = make_plan(config, Topology(""), request=request).estimate
    simulated = make_plan(config, Topology(""), request=dataclasses.replace(request, simulate=True)).estimate
    assert closed_form.peak_bytes == pytest.approx(simulated.peak_bytes, rel=0.02)
    assert simulated.peak_bytes == pytest.approx(simulated.moments[SIMULATED], rel=0.002)  # all parts of both agree


# ---- the command -----------------------------------------------------------------------------------------------------


def test_exit_code_3_where_it_does_not_fit(capsys):
    for memory, code in (("80GB", 0), ("4GB", 3)):
        assert main(["plan", str(RECIPES["e4b_qlora_16gb"]), table.NO_SHARDS, "--gpu-memory", memory]) == code
        assert ("does not fit" in capsys.readouterr().out) == (code == 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-memory", "lots"], "--gpu-memory lots: no size of a GPU"),
        (["--gpu-memory", ""], "--gpu-memory has no value"),
        (["--num-tokens", "100", "--num-images", "1"], "1 images of 280 tokens are 280 tokens"),
        (["--num-gpus", "3"], "not a multiple of 3 ranks"),
        (["lerning_rate=1"], "did you mean train.learning_rate"),
        (["model_name_or_path=tests"], "config.json cannot be read"),
    ],
)
def test_exit_code_2_for_what_cannot_be_planned(capsys, words, message):
    assert main(["plan", str(RECIPES["e4b_qlora_16gb"]), table.NO_SHARDS, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_json_adds_up(capsys):
    code, found = plan_json(capsys, str(RECIPES["e4b_qlora_16gb"]), "--gpu-memory", "16GB", "--num-images", "2")
    assert code == 0
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert found["needed_bytes"] == found["peak_bytes"] + sum(found["margin"].values())
    assert found["needed_bytes_range"][0] < found["needed_bytes"] < found["needed_bytes_range"][1]
    assert found["fits"] is True
    assert found["batch"] | {"origin": ""} == {
        "num_tokens": 4096,
        "num_ranks": 1,
        "num_images": 2,
        "tokens_per_image": 280,
        "origin": "",
    }
    # fmt: off
    assert list(found) == [
        "model", "tuning", "num_gpus", "zero_stage", "fsdp", "num_parameters", "num_trained", "batch", "num_steps",
        "steps_per_epoch", "tokens_per_epoch", "parts", "moment", "peak_bytes", "margin", "margin_origin",
        "needed_bytes", "needed_bytes_range", "available_bytes", "fits", "levers", "host", "disk",
    ]
    # fmt: on


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("e4b_qlora_16gb", ["model.attn_implementation=eager", "optim=adamw_torch", "gradient_checkpointing=false"]),
        ("e4b_lora_zero2", ["--num-gpus", "8", "per_device_train_batch_size=2"]),
        ("26b_qlora", []),
    ],
)
def test_each_lever_saves_what_it_says(capsys, recipe, words):
    """Typed as it is printed, the difference of the two plans is the figure beside it."""
    before = plan_json(capsys, str(RECIPES[recipe]), *words)[1]
    assert before["levers"]
    assert [one["saves_bytes"] for one in before["levers"]] == sorted(
        (one["saves_bytes"] for one in before["levers"]), reverse=True
    )
    for lever in before["levers"]:
        after = plan_json(capsys, str(RECIPES[recipe]), *words, *lever["change"].split(" "))[1]
        assert before["needed_bytes"] - after["needed_bytes"] == lever["saves_bytes"] > 0, lever


def test_shards_say_how_long_and_with_how_many_images(tmp_path, model):
    shard_rows(tmp_path, model, [row(number) for number in range(4)])
    words = [f"model_name_or_path={model}", f"data.train={tmp_path}/shards", "per_device_train_batch_size=1"]
    config = load_config(RECIPES["cpu_lora"], words)
    shards = resolve(config, Topology("")).schedule.shards
    work = make_plan(config, Topology("")).work
    assert work.batch.num_tokens == (shards.num_text_tokens + shards.num_image_tokens).max()
    assert work.batch.num_images == shards.num_images.max()
    assert work.tokens_per_epoch == shards.num_text_tokens.sum() + shards.num_image_tokens.sum()
    assert work.steps_per_epoch == 1


def test_images_of_many_sizes_are_planned_by_their_tokens(tmp_path, model):
    """Not as the most images of any micro-batch, each of the largest size: together they might not fit into one."""
    shard_rows(tmp_path, model, [row(number, num_calls=1 + number) for number in range(4)])
    words = [f"model_name_or_path={model}", f"data.train={tmp_path}/shards", "per_device_train_batch_size=1"]
    config = load_config(RECIPES["cpu_lora"], words)
    run = resolve(config, Topology(""))
    shards = run.schedule.shards
    assert sorted(shards.num_images) == [0, 0, 1, 4]
    shards.num_image_tokens = np.where(shards.num_images == 1, 200, shards.num_images * 10)
    batch = workload_of(config, run).batch
    assert (batch.num_images, batch.tokens_per_image) == (1, 200)


def test_a_card_is_named_as_it_is_sold():
    assert parse_memory("16GB") == parse_memory("16") == parse_memory(" 16 gib") == 16
    with pytest.raises(ConfigError, match="no size of a GPU"):
        parse_memory("0GB")


def test_a_calibrated_machine_has_its_own_margin(tmp_path):
    assert read_margin() == Margin()
    path = write_calibration("Some GPU", context_bytes=GIB, fragmentation=0.1)
    margin = read_margin()
    assert path.parent.parent == tmp_path / "caches"
    assert margin.origin == "measured on Some GPU"
    assert margin.parts(10 * GIB, 1)["CUDA context"] == GIB
    assert margin.parts(10 * GIB, 1)["fragmentation"] == GIB
    assert margin.total(10 * GIB, 1, 0) == margin.total(10 * GIB, 1, 2)
    odd = (f'{{"gpu": "a", "context_bytes": {context}, "fragmentation": {part}}}' for context, part in ODD)
    for broken in ("{}", "[]", *odd):
        path.write_text(broken)
        with pytest.raises(ConfigError, match="no calibration"):
            read_margin()


# ---- train -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, model: str) -> Run:
    shard_rows(tmp_path, model, [row(number) for number in range(4)])
    words = [f"model_name_or_path={model}", f"data.train={tmp_path}/shards"]
    return resolve(load_config(RECIPES["cpu_lora"], words), Topology(""))


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package's logger says."""
    monkeypatch.setattr(logging.getLogger("gemma_dist"), "propagate", True)
    caplog.set_level(logging.INFO, "gemma_dist")
    return caplog


@pytest.mark.parametrize(("num_bytes", "warns"), [(GIB // 2, True), (4 * GIB, False)])
def test_a_run_that_does_not_fit_is_warned_of(run, spoken, num_bytes, warns):
    PlanWatch().begin(run, Gpu("Some GPU", num_bytes))
    assert any(record.levelno == logging.WARNING for record in spoken.records) == warns
    assert f"of the {num_bytes / GIB:.1f} GiB of this Some GPU" in spoken.text
    assert ("may run out of memory" in spoken.text) == warns


def test_a_cpu_is_not_planned_and_not_calibrated(run, spoken):
    PlanWatch().begin(run, None)
    assert "what a CPU takes is not planned" in spoken.text
    with pytest.raises(ConfigError, match="--calibrate measures a GPU"):
        PlanWatch(calibrate=True).begin(run, None)


def test_a_plan_that_fails_stops_no_run(run, spoken):
    nowhere = run.config.model_copy(update={"model": run.config.model.model_copy(update={"model_name_or_path": "/no"})})
    PlanWatch().begin(dataclasses.replace(run, config=nowhere), Gpu("Some GPU", GIB))
    assert "could not be planned" in spoken.text


def test_what_a_gpu_really_took_is_said_and_kept(run, spoken):
    watch = PlanWatch(calibrate=True)
    watch.begin(run, Gpu("Some GPU", 80 * GIB))
    watch.measured(MemorySeen(Gpu("Some GPU", 80 * GIB), 10 * GIB, 11 * GIB, int(11.5 * GIB)))
    assert "allocated 10.00 GiB" in spoken.text
    assert "reserved 11.00 GiB" in spoken.text
    margin = read_margin()
    assert margin.context[1] == GIB // 2
    assert margin.fragmentation[1] == pytest.approx(0.1)


def test_a_calibration_that_cannot_be_kept_stops_no_run(run, spoken, tmp_path):
    watch = PlanWatch(calibrate=True)
    watch.begin(run, Gpu("Some GPU", 80 * GIB))
    (tmp_path / "caches").write_text("a file in the place of the folder")
    watch.measured(MemorySeen(Gpu("Some GPU", 80 * GIB), 10 * GIB, 11 * GIB, int(11.5 * GIB)))
    assert "could not be kept" in spoken.text


# ---- what is printed elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_a_recipe_says_what_the_plan_says_and_fits(recipe):
    line = table.recipe_line(RECIPES[recipe])
    assert line is not None, "a recipe for GPUs has a line `# plan: … GiB of …`"
    assert line in RECIPES[recipe].read_text().splitlines(), "run python -m gemma_dist.plan.table"
    needed, memory = (float(number) for number in (line.split()[2], line.split()[5]))
    assert needed <= 0.97 * memory


def test_the_page_has_the_tables_as_they_are():
    page = (ROOT / table.PAGE).read_text()
    assert table.with_tables(page) == page, "run python -m gemma_dist.plan.table"


@pytest.mark.parametrize(
    ("words", "cost"),
    [
        (["label_smoothing_factor=0.1"], "14.0 GiB (4,096 x 262,144 x 14 bytes)"),
        (["label_smoothing_factor=0.1", "packing=false", "packing_length=null"], "; at 4,096 tokens that is 14.0 GiB"),
        (["use_liger_kernel=true", "packing_length=2048"], "7.0 GiB (2,048 x 262,144 x 14 bytes)"),
        (["prepare_model_for_kbit_training=true"], "6.5 GiB more"),
        (["neftune_noise_alpha=5"], "not offered"),
    ],
)
def test_what_would_undo_the_fused_loss_is_refused_with_its_price(words: Sequence[str], cost):
    with pytest.raises(ConfigError) as error:
        load_config(RECIPES["e4b_qlora_16gb"], words)
    assert cost in str(error.value)
