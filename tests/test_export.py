"""Export: what an engine held is what its folder gives, bit by bit; what is damaged or odd is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.config_merge import ExportConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.export import zero
from gemma_dist.export.run import export
from gemma_dist.export.weights import from_zero
from gemma_dist.export.zero import Pieces, ZeroFolder, find_zero_folder
from gemma_dist.merge import stream
from gemma_dist.recipe import load_config
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows
from tests.support.ranks import gemma_dist, long, needs_compiler
from tests.support.zero_folders import CASES, write_zero_folders

MODELS = ["1:zero2-round-robin", "2:zero1", "2:zero3"]
ADAPTERS = ["2:zero3-lora"]
ALL = [f"{num_ranks}:{case}" for num_ranks in (1, 2, 4) for case in CASES]
EMBEDDING = "model.language_model.embed_tokens.weight"
SHARED = "model.language_model.layers.{}.self_attn.{}.weight"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tiny models come in several blocks, too."""
    monkeypatch.setattr(stream, "BLOCK_VALUES", 1)


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """Folders of DeepSpeed's by ranks and case, such as 2-zero1. Tests only read them."""
    return write_zero_folders(Path(model), tmp_path_factory.mktemp("zero"), *MODELS, *ADAPTERS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The model with the keys and values of layers 4 and 5 that Google's files have."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in (4, 5):
        for kind in ("k_proj", "v_proj", "k_norm"):
            tensors[SHARED.format(layer, kind)] = tensors[SHARED.format(layer - 2, kind)] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a full fine-tuning of one step."""
    folder = tmp_path_factory.mktemp("run")
    shard_rows(folder, str(base), [row(number) for number in range(4)])
    train(load_config("launch/cpu_full.yaml", _settings(base, folder, folder / "out")))
    return folder / "out"


def _settings(base: Path, data: Path, out: Path) -> list[str]:
    batch = ["max_steps=1", "global_batch_size=2", "per_device_train_batch_size=1", "dataloader_num_workers=0"]
    return [f"model_name_or_path={base}", f"data.train={data / 'shards'}", f"output_dir={out}", *batch]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def exported(checkpoint: Path, out: Path, base: Path | None = None, lm_head: bool = False, **settings: Any) -> Any:
    return export(checkpoint, out, ExportConfig(**settings), base=base, lm_head=lm_head)


def require_loads(folder: Path) -> Any:
    """transformers finds every tensor, and has no use for none."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(50, 70)[None]
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits


# --- folders of DeepSpeed's engine ---------------------------------------------------------------------------------


def require_held(folder: Path, out: Path) -> None:
    """A model's folder has each tensor that the engine held, rounded once to the dtype of the model."""
    held = load_file(folder / "held.safetensors")
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    found = tensors_of(out)
    assert found.keys() == held.keys()
    for name, value in held.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value.to(dtype)), name
    assert torch.equal(found["model.language_model.layers.2.layer_scalar"], torch.tensor([0.75], dtype=dtype))
    assert torch.equal(require_loads(out).lm_head.weight, found[EMBEDDING])


def require_adapter(folder: Path, out: Path, model: Path) -> None:
    """An adapter's folder has what was trained, in float32, and PEFT finds all of it."""
    from peft import PeftModel

    held = load_file(folder / "held.safetensors")
    trained = {name.replace(".default", ""): value for name, value in held.items() if ".lora_" in name}
    found = tensors_of(out)
    assert found.keys() == trained.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, trained[name].float()), name
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model, dtype="auto"), out)
    of_model = {name.replace(".default", ""): value for name, value in loaded.named_parameters() if ".lora_" in name}
    assert of_model.keys() == found.keys()
    assert all(torch.equal(of_model[name], value) for name, value in found.items())


@needs_compiler
@pytest.mark.parametrize("case", MODELS)
def test_a_model_has_the_bits_that_the_engine_held(zeros: Path, tmp_path: Path, case: str) -> None:
    folder = zeros / case.replace(":", "-")
    report = exported(folder, tmp_path / "out")
    require_held(folder, tmp_path / "out")
    assert f"ZeRO-{CASES[case[2:]].stage}, {case[0]} ranks, step 1" in report.summary()


@needs_compiler
def test_the_optimizers_own_bits_are_there_in_float32_and_in_small_files(zeros: Path, tmp_path: Path) -> None:
    folder = zeros / "2-zero3"
    exported(folder / "global_step1", tmp_path / "out", dtype="float32", max_shard_size="1MB", base=None)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 4
    assert all(path.stat().st_size < 1_100_000 for path in (tmp_path / "out").glob("*.safetensors"))
    held, found = load_file(folder / "held.safetensors"), tensors_of(tmp_path / "out")
    assert any(value.dtype == torch.float32 and not torch.equal(value, value.bfloat16()) for value in held.values())
    assert all(torch.equal(found[name], value.float()) for name, value in held.items())
    assert require_loads(tmp_path / "out").dtype == torch.float32


@needs_compiler
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_has_the_bits_that_the_engine_held(zeros: Path, model: str, tmp_path: Path, case: str) -> None:
    folder = zeros / case.replace(":", "-")
    exported(folder, tmp_path / "out")
    require_adapter(folder, tmp_path / "out", Path(model))
    with pytest.raises(CheckpointError, match=r"holds an adapter: .*gemma-dist merge --base"):
        exported(folder, tmp_path / "again", base=Path(model))


@long
@needs_compiler
@pytest.mark.timeout(900)
def test_every_stage_kind_and_number_of_ranks(model: str, tmp_path: Path) -> None:
    folders = write_zero_folders(Path(model), tmp_path / "zero", *ALL)
    for case in ALL:
        folder, out = folders / case.replace(":", "-"), tmp_path / "out"
        kind = CASES[case[2:]]
        if kind.excludes_frozen and not kind.lora:
            with pytest.raises(CheckpointError, match=r"lacks \d+ .*--base"):
                exported(folder, out)
        exported(folder, out, base=Path(model) if kind.excludes_frozen and not kind.lora else None)
        if kind.lora:
            require_adapter(folder, out, Path(model))
        elif not kind.excludes_frozen:
            require_held(folder, out)
        shutil.rmtree(out)


@needs_compiler
def test_what_was_frozen_and_left_out_comes_from_the_base(zeros: Path, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zeros / "2-zero1", tmp_path / "zero1")
    path = folder / "global_step1" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    frozen = [name for name in state["module"] if "vision_tower" in name and name not in state["buffer_names"]]
    for name in frozen:
        del state["module"][name]
    state["shared_params"] = {}  # as early versions of DeepSpeed have it
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"lacks {len(frozen)} of .*vision_tower.*--base"):
        exported(folder, tmp_path / "out")
    exported(folder, tmp_path / "out", base=base)
    found, of_base, held = tensors_of(tmp_path / "out"), tensors_of(base), load_file(folder / "held.safetensors")
    assert all(torch.equal(found[name], of_base[name]) for name in frozen)
    assert all(torch.equal(found[name], held[name].bfloat16()) for name in held if name not in frozen)
    assert found.keys() == of_base.keys()
    require_loads(tmp_path / "out")


def _rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def _change(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=False)
        change(state)
        torch.save(state, folder / name)

    return work


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _universal(folder: Path) -> None:
    (folder / "zero" / "lm_head.weight").mkdir(parents=True)
    (folder / "zero" / "lm_head.weight" / "fp32.pt").touch()


def _step(state: dict[str, Any]) -> None:
    for one in state["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        one["step"] += 1


class Hostile:
    """What a pickle could do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


class Member:
    """What stands in a pickle by a name in something else: Python 3.11.2 writes members of an enum so."""

    def __init__(self, of: object, name: str) -> None:
        self.asked = of, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


MODEL_1, OPTIMIZER_1 = "zero_pp_rank_1_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
FLAT = "fp32_flat_groups"
DAMAGED = {
    "a rank's weights": (_rename(OPTIMIZER_1, "x"), r"of 2 ranks, optim_states.pt is missing of rank 1"),
    "a rank's module": (_rename(MODEL_1, "x"), r"of 2 ranks, model_states.pt is missing of rank 1"),
    "a rank too many": (_rename(OPTIMIZER_1, OPTIMIZER_1.replace("1", "7", 1)), r"missing of rank 1"),
    "cut short": (_cut(OPTIMIZER_1), rf"{OPTIMIZER_1} is not a whole file of torch.save"),
    "another step": (_change(MODEL_1, lambda state: state.update(global_steps=9)), r"2 steps \(rank 0: 1.*rank 1: 9"),
    "another step of the optimizer": (_change(OPTIMIZER_1, _step), r"of the optimizer are of 2 steps"),
    "fewer values": (
        _change(OPTIMIZER_1, lambda state: state["optimizer_state_dict"][FLAT].pop()),
        r"have [\d,]+ values, but its ranks hold [\d,]+",
    ),
    "an unknown layout": (_change(MODEL_1, lambda state: state.pop("global_steps")), r"not those of a DeepSpeed that"),
    "a frozen part": (
        _change(MODEL_1, lambda state: state["frozen_param_fragments"].popitem()),
        r"a rank's file lacks its part of model\.",
    ),
    "code": (_change(MODEL_1, lambda state: state.update(more=Hostile())), r"asks for posix.mkdir, .*could run code"),
    "code by its name": (
        _change(MODEL_1, lambda state: state.update(more=Member(bytearray, "fromhex"))),
        r"asks for builtins.getattr, .*could run code",
    ),
    "universal": (_universal, r"is a universal checkpoint"),
    "tensor parallelism": (_rename(MODEL_1, MODEL_1.replace("mp_rank_00", "mp_rank_01")), r"tensor parallelism"),
    "a pipeline": (_rename(MODEL_1, "layer_01-model_00-model_states.pt"), r"of a pipeline"),
}


@needs_compiler
@pytest.mark.parametrize("what", DAMAGED)
def test_a_folder_that_is_damaged_or_split_otherwise_is_refused_by_name(
    zeros: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, reason = DAMAGED[what]
    folder = shutil.copytree(zeros / "2-zero3", tmp_path / "zero3")
    damage(folder / "global_step1")
    with pytest.raises(CheckpointError, match=reason):
        exported(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zero3"]


@needs_compiler
def test_a_stage_that_is_written_by_its_name_is_read(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": Member(ZeroStageEnum, "weights")}, tmp_path / "states.pt")
    assert zero._load(tmp_path / "states.pt") == {"zero_stage": ZeroStageEnum.weights.value}


def test_which_of_several_steps_is_meant(zeros: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    for step in (1, 2):
        shutil.copytree(zeros / "2-zero1" / "global_step1", folder / f"global_step{step}")
    with pytest.raises(CheckpointError, match=r"holds several checkpoints; give one of .*global_step1, .*global_step2"):
        find_zero_folder(folder)
    (folder / "latest").write_text("global_step2")
    assert find_zero_folder(folder) == folder / "global_step2"
    (folder / "latest").write_text("global_step3")
    with pytest.raises(CheckpointError, match=r"names global_step3, which is not there"):
        find_zero_folder(folder)
    with pytest.raises(CheckpointError, match=r"no config.json lies beside the checkpoint; give .* --base"):
        exported(folder / "global_step2", tmp_path / "out")


@needs_compiler
def test_a_diverged_training_is_refused_and_leaves_nothing(zeros: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zeros / "2-zero3", tmp_path / "zero3")
    diverge = _change(OPTIMIZER_1, lambda state: state["optimizer_state_dict"][FLAT][0].detach().fill_(float("nan")))
    diverge(folder / "global_step1")
    with pytest.raises(CheckpointError, match=r"model\.\S+ holds NaN or infinity: the training diverged"):
        exported(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zero3"]


# --- checkpoints of this package -----------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_is_linked_without_its_optimizer(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint-1"
    exported(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").samefile(checkpoint / "model.safetensors")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"} < names
    assert not [name for name in names if name.startswith(("optimizer", "complete", "README"))]
    record = json.loads((tmp_path / "out" / "gemma_dist.json").read_text())
    assert record["exported_from"] == str(checkpoint)
    assert record["base_weights_hash"]
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert torch.equal(logits(require_loads(tmp_path / "out")), logits(require_loads(checkpoint)))


def test_what_transformers_drops_is_written_again_on_request(run: Path, base: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint-1"
    exported(checkpoint, tmp_path / "out", base=base, lm_head=True)
    found, of_base = tensors_of(tmp_path / "out"), tensors_of(base)
    trained = load_file(checkpoint / "model.safetensors")
    shared = {SHARED.format(layer, kind) for layer in (4, 5) for kind in ("k_proj", "v_proj", "k_norm")}
    assert found.keys() == trained.keys() | shared | {"lm_head.weight"}
    assert all(torch.equal(found[name], of_base[name]) for name in shared)
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    assert torch.equal(found["lm_head.weight"], trained[EMBEDDING])
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").samefile(checkpoint / "model.safetensors")
    assert torch.equal(logits(require_loads(tmp_path / "out")), logits(require_loads(checkpoint)))
    # And what was exported can be exported again, in another dtype.
    exported(tmp_path / "out", tmp_path / "half", dtype="bfloat16")
    half = require_loads(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, trained[EMBEDDING].bfloat16())


def test_a_damaged_checkpoint_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is damaged: model.safetensors holds other bytes"):
        exported(checkpoint, tmp_path / "out")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is damaged: model.safetensors is missing"):
        exported(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_or_read_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"lies in .*checkpoint-1, which is read"):
        exported(run / "checkpoint-1", run / "checkpoint-1" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert main(["export", str(run / "checkpoint-1"), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "is no checkpoint: it has neither config.json" in capsys.readouterr().err
    assert main(["export", str(run / "checkpoint-1"), "--out", "x", "--max-shard-size", "5"]) == 2
    assert "Largest file of weights" in capsys.readouterr().err


def test_a_config_of_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint", ignore=lambda *_: ["complete.json"])
    config = json.loads((checkpoint / "config.json").read_text())
    for changed, reason in {
        "architectures": r"transformers makes no model of .*config.json \(.*Nonsense",
        "model_type": r"transformers makes no model of .*config.json",
        "text_config": r"lacks \d+ of the \d+ tensors|has shape",
    }.items():
        value = {"architectures": ["Nonsense"], "model_type": "nonsense", "text_config": {}}[changed]
        (checkpoint / "config.json").write_text(json.dumps(config | {changed: value}))
        with pytest.raises(CheckpointError, match=reason):
            exported(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(run: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape .* in the checkpoint and .*give the base that was trained"):
        exported(run / "checkpoint-1", tmp_path / "out", base=tiny_model("31b"))


def test_a_name_that_the_base_does_not_know_is_not_replaced_by_the_bases_weight(
    run: Path, base: Path, tmp_path: Path
) -> None:
    """Some tools save names of their own: the trained tensor would lie there unused, beside the untrained one."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(run / "checkpoint-1", checkpoint, ignore=shutil.ignore_patterns("complete.json", "optimizer*"))
    tensors = tensors_of(checkpoint)
    name = "model.language_model.layers.2.mlp.up_proj"
    tensors[f"{name}.inner.weight"] = tensors.pop(f"{name}.weight")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.inner.weight, which .* does not have"):
        exported(checkpoint, tmp_path / "out", base=base)
    with pytest.raises(CheckpointError, match=f"lacks 1 of the .*{name}.weight"):
        exported(checkpoint, tmp_path / "out")


def test_a_head_that_was_trained_apart_needs_a_config_that_says_so() -> None:
    table = torch.ones(8, 4)
    pieces = {name: Pieces((8, 4), [table.reshape(-1)], is_trained=True) for name in (EMBEDDING, "lm_head.weight")}
    zero = ZeroFolder(Path("global_step1"), pieces, {}, stage=1, num_ranks=1, step=1)
    config = {"model_type": "gemma4", "dtype": "bfloat16"}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight was trained apart from the token embedding"):
        from_zero(zero, config, ExportConfig())
    assert len(from_zero(zero, config | {"tie_word_embeddings": False}, ExportConfig()).tensors) == 2


def test_an_adapter_of_ours_is_told_to_be_merged(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-4-E4B-it"}))
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"`gemma-dist merge --base google/gemma-4-E4B-it --adapter {tmp_path} --out" in capsys.readouterr().err


def test_a_full_disk_keeps_links_and_refuses_what_is_written(run: Path, small_disk: Path) -> None:
    leave = shutil.ignore_patterns("complete.json", "optimizer*")
    checkpoint = shutil.copytree(run / "checkpoint-1", small_disk / "checkpoint", ignore=leave)
    with (small_disk / "filler").open("wb") as filler:
        free = shutil.disk_usage(small_disk).free
        filler.write(bytes(free - 500_000))
    with pytest.raises(ConfigError, match=r"needs 3\.\d MiB and its disk has 0\.\d MiB free"):
        exported(checkpoint, small_disk / "half", dtype="bfloat16")
    exported(checkpoint, small_disk / "out")
    assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoint", "filler", "out"]
    assert (small_disk / "out" / "model.safetensors").samefile(checkpoint / "model.safetensors")


@long
@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"])
@pytest.mark.parametrize("style", ["e4b", "26b", "12b"])
def test_a_checkpoint_of_any_launch_loads(
    tiny_model: Callable[..., Path], tmp_path: Path, launch: str, style: str
) -> None:
    model = tiny_model(style)
    shard_rows(tmp_path, str(model), [row(number) for number in range(4)])
    gemma_dist("train", "launch/cpu_full.yaml", *_settings(model, tmp_path, tmp_path / "run"), launch=launch)
    exported(tmp_path / "run" / "checkpoint-1", tmp_path / "out", base=model)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors_of(model).keys()
    assert torch.equal(require_loads(tmp_path / "out").lm_head.weight, found[EMBEDDING])


@pytest.mark.parametrize("style", ["12b"])
def test_names_of_12b_are_those_of_its_files(tiny_model: Callable[..., Path], style: str) -> None:
    from gemma_dist.model.vision import name_in_file, name_in_model

    model = tiny_model(style)
    names = tensors_of(model).keys()
    kind = json.loads((model / "config.json").read_text())["model_type"]
    inner = AutoModelForImageTextToText.from_pretrained(model).state_dict().keys()
    assert {name_in_model(name, kind) for name in names} == inner - {"lm_head.weight"}
    assert {name_in_file(name, kind) for name in inner} == names | {"lm_head.weight"}
