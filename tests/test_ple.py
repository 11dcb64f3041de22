"""Per-layer embeddings that stay in the base's file, and towers that are not loaded: nothing but memory changes.

The launches train pairs of runs that differ in `model.ple` alone, with the workers of the parity matrix. That losses
and gradients do not depend on towers that are not loaded is shown by the matrix itself, whose references load all.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_dist.config import ModelConfig, QuantizationConfig
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.merge.run import merge
from gemma_dist.model.load import load_for_evaluation, load_model, read_config
from gemma_dist.model.per_layer import INDEX, ROWS, PerLayerTable, open_table
from gemma_dist.model.record import four_bit_modules
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.recipe import load_config
from gemma_dist.stream.collate import collate, collate_packs
from gemma_dist.tensorfile import Entry, header_bytes, open_tensors
from tests.parity.bench import Bench
from tests.parity.cells import Cell
from tests.parity.judge import curve, judge
from tests.support.ranks import long, needs_compiler
from tests.test_batch import IDS

NAME = "model.language_model.embed_tokens_per_layer.weight"


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(model: str) -> PerLayerTable:
    opened = open_table(model, read_config(model), torch.float32)
    assert opened is not None
    return opened


def test_rows_are_those_of_the_table_each_once(table: PerLayerTable, model: str) -> None:
    """At images the model looks up the padding's row."""
    config = read_config(model)
    weight = load_file(Path(model) / "model.safetensors")[NAME]
    ids = torch.tensor([[70, 90, 70, config.image_token_id], [90, 90, config.audio_token_id, 70]])
    rows, index = table.gather(ids)
    pad = config.text_config.pad_token_id
    assert rows.shape[0] == 3
    assert torch.equal(rows[index], weight[torch.tensor([[70, 90, 70, pad], [90, 90, pad, 70]])])


def test_rows_have_the_dtype_that_the_model_is_loaded_in(model: str) -> None:
    table = open_table(model, read_config(model), torch.bfloat16)
    weight = load_file(Path(model) / "model.safetensors")[NAME]
    assert table is not None
    assert torch.equal(table.gather(torch.tensor([[5]]))[0][0], weight[5].bfloat16())


def test_a_token_without_a_row_is_an_error_as_on_the_gpu(table: PerLayerTable) -> None:
    with pytest.raises(IndexError):
        table.gather(torch.tensor([[1_000_000]]))


@pytest.mark.parametrize("style", ["31b", "26b"])
def test_models_without_per_layer_embeddings_have_no_table(tiny_model: Callable[..., Path], style: str) -> None:
    folder = str(tiny_model(style))
    assert open_table(folder, read_config(folder), torch.float32) is None


def test_a_model_in_the_cache_of_the_hub_is_read_there(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Its files are links into another folder."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123"
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for path in Path(model).iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    opened = open_table("someone/tiny", read_config(model), torch.float32)
    assert opened is not None
    assert opened.path == snapshot / "model.safetensors"


def test_a_base_of_the_true_size_takes_no_memory_of_a_process(model: str, tmp_path: Path) -> None:
    """E4B's table, 5.25 GiB, in a file of holes: what a step of 4,096 tokens adds is its rows."""
    config, shape = read_config(model), (262_144, 10_752)
    text = config.text_config
    text.vocab_size_per_layer_input, text.num_hidden_layers, text.hidden_size_per_layer_input = 262_144, 42, 256
    entry = Entry("BF16", shape, 0, 2 * shape[0] * shape[1])
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header_bytes({NAME: entry}, {}))
        file.truncate(file.tell() + entry.num_bytes)
    before = anonymous_memory()
    table = PerLayerTable(open_tensors(tmp_path / "model.safetensors"), NAME, config, torch.bfloat16)
    rows, _ = table.gather(torch.randint(shape[0], (1, 4096)))
    assert rows.nbytes > 80 * 2**20
    assert anonymous_memory() - before < rows.nbytes + 30 * 2**20


def anonymous_memory() -> int:
    """Bytes of this process that are in no file."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_what_trains_is_on_the_gpu() -> None:
    with pytest.raises(ConfigError, match=r"model.ple: host, but tuning is full, .*; remove it, or set tuning: lora"):
        load_config(Path("launch/cpu_full.yaml"), ["model.ple=host"])


@pytest.mark.parametrize(
    ("tuning", "ple", "on_host"),
    [
        ("lora", "auto", True),
        ("qlora", "auto", True),
        ("full", "auto", False),
        ("lora", "gpu", False),
        ("qlora", "host", True),
    ],
)
def test_auto_is_the_host_where_the_base_is_frozen(tuning: str, ple: str, on_host: bool) -> None:
    assert load_config(Path(f"launch/cpu_{tuning}.yaml"), [f"model.ple={ple}"]).ple_on_host == on_host


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "holds no embed_tokens_per_layer.weight in safetensors"),
        ({NAME: Entry("F32", (3, 4), 0, 48)}, r"has the shape \(3, 4\), and config.json describes \(\d+, 96\)"),
        ({NAME: Entry("I8", (0, 0), 0, 0)}, "is stored as I8; .* set `ple: gpu`"),
    ],
)
def test_a_base_without_the_table_is_refused(
    model: str, tmp_path: Path, entries: dict[str, Entry], message: str
) -> None:
    config = read_config(model)
    text = config.text_config
    rows = text.vocab_size_per_layer_input
    for name, entry in entries.items():
        if entry.dtype == "I8":
            entries = {name: Entry("I8", (rows, 96), 0, 96 * rows)}
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header_bytes(entries, {}))
        file.write(bytes(sum(entry.num_bytes for entry in entries.values())))
    with pytest.raises(CheckpointError, match=message):
        open_table(str(tmp_path), config, torch.float32)


def test_weights_that_an_earlier_save_left_beside_the_model_are_not_read(model: str, tmp_path: Path) -> None:
    """transformers loads model.safetensors, or else what the index lists, and nothing else."""
    weights = load_file(Path(model) / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NAME: "model-2-of-2.safetensors"}})
    )
    for number, name in enumerate(["extra", "model-1-of-2", "model-2-of-2", "model"]):
        save_file({NAME: weights[NAME] + number}, tmp_path / f"{name}.safetensors")
    for expected, read in ((3, "model"), (2, "model-2-of-2")):
        table = open_table(str(tmp_path), read_config(model), torch.float32)
        assert table is not None
        assert torch.equal(table.gather(torch.tensor([[5]]))[0][0], weights[NAME][5] + expected)
        (tmp_path / f"{read}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2-of-2.safetensors cannot be read"):
        open_table(str(tmp_path), read_config(model), torch.float32)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_base_that_is_written_to_stops_the_run_before_it_reads_from_it(
    model: str, tmp_path: Path, damage: str
) -> None:
    """To read behind the end of a mapped file kills a process without a word."""
    path = shutil.copytree(model, tmp_path / "model") / "model.safetensors"
    table = open_table(str(path.parent), read_config(model), torch.float32)
    assert table is not None
    if damage == "cut":
        os.truncate(path, 100)
    else:
        with path.open("r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"changed while per-layer embeddings were read from it; restore .* gpu"):
        table.gather(torch.tensor([[5]]))


def test_a_base_that_is_removed_or_replaced_stays_what_it_was(table: PerLayerTable, model: str, tmp_path: Path) -> None:
    path = shutil.copytree(model, tmp_path / "model") / "model.safetensors"
    opened = open_table(str(path.parent), read_config(model), torch.float32)
    assert opened is not None
    path.with_suffix(".new").write_bytes(b"another")
    path.with_suffix(".new").replace(path)
    assert torch.equal(opened.gather(torch.tensor([[5]]))[0], table.gather(torch.tensor([[5]]))[0])


# ---- the model -------------------------------------------------------------------------------------------------------


def load(model: str, table: PerLayerTable | None, *without: Any, four_bits: bool = False) -> Any:
    settings = ModelConfig(model_name_or_path=model, dtype="float32")
    quantization = QuantizationConfig(bnb_4bit_compute_dtype="float32") if four_bits else None
    return load_model(settings, quantization, packing=False, table=table, without=without).eval()


def test_the_table_is_no_parameter_and_all_else_is_as_it_was(table: PerLayerTable, model: str) -> None:
    on_host, on_gpu = load(model, table), load(model, None)
    expected = dict(on_gpu.state_dict())
    del expected[NAME]
    found = on_host.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_rows_of_the_batch_or_of_the_file_give_the_logits_of_the_gpu(table: PerLayerTable, model: str) -> None:
    on_host, on_gpu = load(model, table), load(model, None)
    ids = torch.arange(40).view(2, 20) + 100
    batch = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    with_rows = table.add_rows(batch)
    assert with_rows.keys() - batch.keys() == {ROWS, INDEX}
    with torch.no_grad():
        expected = on_gpu(**batch).logits
        assert torch.equal(on_host(**with_rows).logits, expected)
        assert torch.equal(on_host(**batch).logits, expected)
        with_rows[ROWS] = torch.zeros_like(with_rows[ROWS])
        assert not torch.allclose(on_host(**with_rows).logits, expected, atol=1e-3), "the rows were not looked at"


@pytest.mark.parametrize(
    ("frozen", "has_images", "left_out"),
    [(True, True, {"audio"}), (True, False, {"audio", "vision"}), (False, True, set()), (False, False, set())],
)
def test_towers_are_left_out_where_nothing_asks_them(frozen: bool, has_images: bool, left_out: set[str]) -> None:
    assert set(unneeded_towers(frozen=frozen, has_images=has_images)) == left_out


@pytest.mark.parametrize("style", ["e4b", "31b", "26b"])
def test_4_bits_are_where_transformers_has_them(tiny_model: Callable[..., Path], style: str) -> None:
    """Left to itself, `from_pretrained` decides so; earlier versions left it to itself."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    folder = str(tiny_model(style))
    plain = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert four_bit_modules(load(folder, None, four_bits=True)) == four_bit_modules(plain)


@pytest.mark.parametrize(("style", "without"), [("e4b", ["audio"]), ("e4b", ["audio", "vision"]), ("31b", ["vision"])])
def test_a_base_is_in_4_bits_where_the_whole_model_is(
    tiny_model: Callable[..., Path], style: str, without: list[str], capfd: Any
) -> None:
    """Whatever is left out of it."""
    folder = str(tiny_model(style))
    whole, part = load(folder, None, four_bits=True), load(folder, None, *without, four_bits=True)
    assert "UNEXPECTED" not in "".join(capfd.readouterr()), "what is left out on purpose is no news"
    left_out = re.compile("|".join(without))
    assert four_bit_modules(part) == [name for name in four_bit_modules(whole) if not left_out.search(name)]
    assert not [name for name, _ in part.named_parameters() if left_out.search(name)]
    ids = torch.arange(40)[None] + 100
    with torch.no_grad():
        logits = [one(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits for one in (whole, part)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("make", [collate, collate_packs])
def test_without_a_vision_tower_there_is_no_filler(make: Any) -> None:
    """A rank that has nothing at a step still has a row to run, of which nothing is trained."""
    batch = make([], IDS, filler=False)
    assert "pixel_values" not in batch
    assert batch["input_ids"].tolist() == [[IDS.pad, IDS.pad]]
    assert (batch["labels"] == IGNORE_INDEX).all()


# ---- whole runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossed(Cell):
    """Per-layer embeddings on the host, resumed from a checkpoint of a run that had them on the GPU."""

    @property
    def whole(self) -> Cell:
        return Cell(**{**vars(super().whole), "ple": "gpu"})


QLORA = Cell("single", "qlora", "e4b", "some", packing=True, checkpointing=True, ple="host")
# Images in some rows or all; packed and not, checkpointed and not, in 4 bits and not, in both dtypes.
CELLS = [
    QLORA,
    Cell("cpu_ddp", "lora", "e4b", "images", checkpointing=True, dtype="bfloat16", ple="host"),
    Cell("cpu_zero2", "qlora", "e4b", "some", packing=True, dtype="bfloat16", ple="host"),
    Cell("cpu_zero3", "lora", "e4b", "some", packing=True, accumulation=4, checkpointing=True, ple="host"),
]
PARAMS = [pytest.param(cell, marks=[long] * (cell.launch != "single"), id=cell.launch) for cell in CELLS]
RESUMED = Crossed("single", "qlora", "e4b", "some", packing=True, checkpointing=True, ple="host", resumed_from="single")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ple"))


@needs_compiler
@pytest.mark.parametrize("cell", PARAMS)
def test_a_run_is_the_same_in_the_last_bit(bench: Bench, cell: Cell) -> None:
    twin = replace(cell, ple="gpu")
    bench.train(cell.launch, [cell, twin])
    assert curve(bench.of(cell)) == curve(bench.of(twin))
    for name in ("gradients.safetensors", "logits.safetensors", "out/adapter_model.safetensors"):
        found, expected = load_file(bench.of(cell) / name), load_file(bench.of(twin) / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@long
def test_a_run_goes_on_with_the_other_setting(bench: Bench) -> None:
    bench.train("single", [RESUMED.whole, RESUMED])
    assert judge(bench, RESUMED) == {"resume": 0, "ok": True}


def test_the_result_is_evaluated_and_merged_as_it_was_trained(bench: Bench, tmp_path: Path) -> None:
    """Also what nothing asked for: the merged model has all that the base has."""
    bench.train("single", [QLORA])
    base, adapter = bench.model("e4b", "float32"), bench.of(QLORA) / "out"
    record = json.loads((adapter / "gemma_dist.json").read_text())
    assert not [name for name in record["quantization"]["modules"] if "audio" in name]
    evaluated = [load_for_evaluation(str(base), adapter, ple_on_host=on_host) for on_host in (True, False)]
    assert four_bit_modules(evaluated[0]) == record["quantization"]["modules"]
    probe = load_file(bench.probe_of(QLORA))
    del probe["position_ids"]
    with torch.no_grad():
        logits = [one(**probe).logits for one in evaluated]
    assert torch.equal(*logits)
    trained = load_file(bench.of(QLORA) / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits[0], trained, atol=1e-4, rtol=0)
    ids = probe["input_ids"][:, :20]
    answers = [one.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for one in evaluated]
    assert torch.equal(*answers)

    merge(str(base), adapter, tmp_path / "merged", verify=True, base_weights="as_trained")
    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    unasked = [name for name in expected if "audio" in name or "per_layer.weight" in name]
    assert len(unasked) > 10
    assert all(torch.equal(found[name], expected[name]) for name in unasked)
