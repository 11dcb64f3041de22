"""A model folder is data: no code in it runs, and its tokenizer fits its embeddings, or a verb says so at once."""

import io
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemma_dist.__main__ import main
from gemma_dist.errors import CheckpointError
from gemma_dist.model.folder import local_folder, refuse_custom_code
from gemma_dist.model.load import load_for_evaluation
from tests.support.corpus import row, shard_rows

# What a model folder could bring along; whoever imports it leaves a mark.
EVIL = """
from pathlib import Path
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Processor, PreTrainedTokenizerFast

Path({mark!r}).touch()

class EvilConfig(Gemma4Config):
    model_type = "evil"

class EvilModel(Gemma4ForConditionalGeneration): pass
class EvilProcessor(Gemma4Processor): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""
IMAGE_PROCESSOR = {"image_processor_type": "EvilImages", "auto_map": {"AutoImageProcessor": "evil.EvilImages"}}
# What a file says, and so what transformers would look for in the folder.
CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "model_type": (
        "config.json",
        {
            "model_type": "evil",
            "architectures": ["AutoModelForImageTextToText"],
            "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForImageTextToText": "evil.EvilModel"},
        },
    ),
    "processor_class": (
        "processor_config.json",
        {"processor_class": "EvilProcessor", "auto_map": {"AutoProcessor": "evil.EvilProcessor"}},
    ),
    "image_processor": ("processor_config.json", {"image_processor": IMAGE_PROCESSOR}),
    "tokenizer_class": (
        "tokenizer_config.json",
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}},
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A folder with `rows.jsonl` and `shards`."""
    folder = tmp_path_factory.mktemp("corpus")
    shard_rows(folder, model, [row(number) for number in range(4)])
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("adapter")
    settings = LoraConfig(r=2, target_modules=r"model\.language_model\.layers\.0\.self_attn\.q_proj")
    get_peft_model(AutoModelForImageTextToText.from_pretrained(model), settings).save_pretrained(folder)
    return folder


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str]]:
    """The exit code of a verb and all that it says, with a `y` for every question that it might ask."""

    def run(verb: str, model: Path | str, adapter: Path | str) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
        recipe = str(Path(__file__).parents[1] / "launch" / "cpu_lora.yaml")
        changes = [f"model_name_or_path={model}", f"data.train={corpus / 'shards'}", f"output_dir={tmp_path / 'run'}"]
        changes += ["max_steps=1", "global_batch_size=4", "per_device_train_batch_size=2", "optim=adamw_torch"]
        rows = str(corpus / "rows.jsonl")
        words: dict[str, list[Any]] = {
            "shard": [rows, "--model", model, "--out", tmp_path / "shards"],
            "inspect": [rows, "--model", model],
            "check": [recipe, *changes],
            "train": [recipe, *changes],
            "evaluate": ["--model", model, "--adapter", adapter, "--data", rows, "--out", tmp_path / "evaluated",
                         "--max-new-tokens", 2, "--limit", 1],
            "merge": ["--base", model, "--adapter", adapter, "--out", tmp_path / "merged", "--verify"],
        }  # fmt: skip
        code = main([verb, *map(str, words[verb])])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def poisoned(source: Path | str, folder: Path, kind: str) -> tuple[Path, Path]:
    """A copy with code of its own, and the mark that the code leaves if it runs."""
    shutil.copytree(source, folder)
    mark = folder.parent / "mark"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    name, changes = CODE[kind]
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return folder, mark


@pytest.mark.parametrize("verb", ["shard", "inspect", "check", "train", "evaluate", "merge"])
@pytest.mark.parametrize("kind", CODE)
def test_no_code_of_a_model_folder_runs(
    kind: str, verb: str, model: str, adapter: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder, mark = poisoned(model, tmp_path / "model", kind)
    code, said = run(verb, folder, adapter)
    assert not mark.exists()
    assert code == 2
    assert f"'{folder}': {CODE[kind][0]} asks for code of its own" in said
    assert "evil.Evil" in said
    assert "take auto_map out" in said
    assert "[y/N]" not in said
    assert "trust_remote_code" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
@pytest.mark.parametrize("kind", ["processor_class", "tokenizer_class"])
def test_no_code_of_an_adapter_folder_runs(
    kind: str, verb: str, model: str, adapter: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"  # with the processor's files beside the adapter, as training publishes them
    shutil.copytree(adapter, whole)
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(Path(model) / name, whole / name)
    folder, mark = poisoned(whole, tmp_path / "poisoned", kind)
    code, said = run(verb, model, folder)
    assert not mark.exists()
    assert code == 2
    assert f"'{folder}': {CODE[kind][0]} asks for code of its own" in said
    assert "[y/N]" not in said


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
def test_the_library_that_an_adapter_names_is_not_imported(
    verb: str,
    model: str,
    adapter: Path,
    run: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {"base_model_class": "EvilModel", "parent_library": "evil"}
    monkeypatch.setitem(CODE, "auto_mapping", ("adapter_config.json", {"auto_mapping": named}))
    folder, mark = poisoned(adapter, tmp_path / "poisoned", "auto_mapping")
    monkeypatch.syspath_prepend(folder)
    code, said = run(verb, model, folder)
    assert code == 0, said
    assert not mark.exists()


def test_files_without_code_pass_however_odd_they_are(tmp_path: Path, model: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"auto_map": {}, "parts": [1, null]}')
    (tmp_path / "model" / "video_preprocessor_config.json").write_text("no JSON")
    refuse_custom_code(tmp_path / "model")
    refuse_custom_code("nobody/has-this-model")
    refuse_custom_code("no/name/at all")


@pytest.mark.parametrize("verb", ["shard", "inspect", "train", "evaluate"])
@pytest.mark.parametrize("table", ["vocab_size", "vocab_size_per_layer_input"])
def test_a_tokenizer_larger_than_the_embeddings_is_refused(
    table: str, verb: str, model: str, adapter: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    num_tokens = config["text_config"]["vocab_size"]
    if table == "vocab_size":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<|own|>"])
        tokenizer.save_pretrained(folder)
        told = f"ids up to {num_tokens} ('<|own|>'), but embed_tokens of '{folder}' has {num_tokens} rows"
    else:
        config["text_config"][table] -= 1
        (folder / "config.json").write_text(json.dumps(config))
        told = f"but embed_tokens_per_layer of '{folder}' has {num_tokens - 1} rows"
    code, said = run(verb, folder, adapter)
    assert code == 2
    assert told in said
    assert "resize_token_embeddings" in said
    assert "Traceback" not in said


def test_an_adapters_tokenizer_is_held_against_the_models_embeddings(
    model: str, adapter: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    processor = AutoProcessor.from_pretrained(model)
    processor.tokenizer.add_tokens(["<|own|>"])
    processor.save_pretrained(folder)
    code, said = run("evaluate", model, folder)
    assert code == 2
    assert f"the tokenizer of '{folder}' has ids up to" in said
    assert f"embed_tokens of '{model}' has" in said


def test_a_hub_model_is_fetched_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        fetched.append((name, allow_patterns))
        if name != "google/gemma":
            raise RuntimeError("401 Client Error\nwith more lines")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder(tmp_path, "--base here") == tmp_path
    assert not fetched, "what lies here is not asked for elsewhere"
    assert local_folder("google/gemma", "--base google/gemma") == tmp_path / "snapshot"
    assert not any(fnmatch("modeling.py", pattern) for pattern in fetched[0][1])
    with pytest.raises(CheckpointError) as refused:
        local_folder("google/gemna", "--base google/gemna")
    assert str(refused.value) == (
        "--base google/gemna is neither a folder nor a model that could be fetched (401 Client Error); check the name"
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["shard", "{rows}", "--model", "{base}", "--out", "{out}"], "--chat-template "),
        (["evaluate", "--model", "{base}", "--data", "{rows}", "--out", "{out}"], "--chat-template "),
        (
            ["train", "launch/cpu_lora.yaml", "model_name_or_path={base}", "data.train={shards}", "output_dir={out}"],
            "data.chat_template=",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_base_checkpoint_without_a_template_is_told_which_one_to_take(
    corpus: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], option: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base, ignore=shutil.ignore_patterns("chat_template*"))
    places = {"base": base, "rows": corpus / "rows.jsonl", "shards": corpus / "shards", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in command]) == 2
    said = capsys.readouterr().err
    assert "has no chat template, as a base checkpoint that was never tuned to chat" in said
    assert f"{option}FILE with the chat_template.jinja of its -it sister" in said
    assert f"{option}gemma4_v5" in said


@pytest.mark.parametrize("ple_on_host", [True, False])
def test_weights_of_another_shape_than_the_config_says_are_named(model: str, tmp_path: Path, ple_on_host: bool) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.norm.weight"
    save_file(weights | {name: weights[name][:-8].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    shapes = rf"1 weights have other shapes .* {name} with \(120,\) instead of \(128,\); get a complete copy"
    with pytest.raises(CheckpointError, match=shapes):
        load_for_evaluation(str(folder), None, ple_on_host=ple_on_host)


# ---- weights that are a pickle ---------------------------------------------------------------------------------------


@pytest.fixture
def pickled(model: str, adapter: Path, tmp_path: Path) -> tuple[str, str]:
    """A model and an adapter whose weights are pickles."""
    for source, name in ((model, "pytorch_model-00001-of-00002.bin"), (adapter, "adapter_model.bin")):
        copy = tmp_path / Path(source).name.replace("e4b-float32", "model")
        shutil.copytree(source, copy)
        (weights,) = copy.glob("*.safetensors")
        weights.rename(copy / name)
    return str(tmp_path / "model"), str(tmp_path / adapter.name)


@pytest.mark.parametrize("verb", ["shard", "inspect", "check", "train", "evaluate", "merge"])
def test_a_model_of_pickles_is_refused(verb: str, run: Any, pickled: tuple[str, str], adapter: Path) -> None:
    code, said = run(verb, pickled[0], adapter)
    assert code == 2, said
    assert "holds its weights as a pickle (pytorch_model-00001-of-00002.bin), which can run code when read" in said


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
def test_an_adapter_of_pickles_is_refused(verb: str, run: Any, pickled: tuple[str, str], model: str) -> None:
    code, said = run(verb, model, pickled[1])
    assert code == 2, said
    assert "holds its weights as a pickle (adapter_model.bin), which can run code when read" in said


def test_so_are_they_where_one_talks_serves_or_exports(pickled: tuple[str, str], model: str, capsys: Any) -> None:
    bad_model, bad_adapter = pickled
    out = str(Path(bad_model).parent / "out")
    for words in (
        ["chat", bad_model],
        ["chat", model, "--adapter", bad_adapter],
        ["check-model", bad_model],
        ["serve", bad_model],
        ["export", bad_model, "--out", out],
        ["extract", model, bad_model, "--out", out],
        ["export", "--adapter", bad_adapter, "--base", model, "--for", "vllm", "--out", out],
    ):
        assert main(words) == 2, words
        assert "as a pickle" in capsys.readouterr().err, words
