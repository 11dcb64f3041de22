"""GGUF: files that llama.cpp's own package writes, and the names that its converter has for our tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EncodingConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.gguf import read_metadata
from gemma_dist.gemma_format import CONTROL_TOKENS
from gemma_dist.model.tiny import newest_template
from gemma_dist.serving.gguf import VISIBLE, check_gguf
from gemma_dist.tensorfile import open_tensors
from tests.support.corpus import row, write_rows

gguf = pytest.importorskip("gguf")

USER_DEFINED, CONTROL = 4, 3


def write_gguf(
    path: Path, *, template: str | None, visible: int = USER_DEFINED, arch: str = "gemma4", eos: int = 1
) -> Path:
    """A GGUF of the metadata that the converter writes, with one tensor."""
    import numpy as np

    tokens = [*CONTROL_TOKENS, "word", "étude"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(6)
    writer.add_sliding_window_pattern([True, False] * 3)
    writer.add_final_logit_softcapping(30.0)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([visible if token in VISIBLE else CONTROL for token in tokens])
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_llama_cpps_package_wrote(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", template=newest_template("e4b"))
    found = read_metadata(path)
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == theirs
    assert found["tokenizer.ggml.tokens"][-1] == "étude"


@pytest.mark.parametrize("style", ["e4b", "31b"])
def test_a_hundred_trajectories_have_the_same_ids_by_the_template_in_a_gguf(
    style: str, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    model = tiny_model(style)
    path = write_gguf(tmp_path / "m.gguf", template=(model / "chat_template.jinja").read_text())
    rows = write_rows(tmp_path / "rows.jsonl", [row(number, num_calls=1 + number % 3) for number in range(100)])
    words = ["check-prompts", str(rows), "--model", str(model), "--unroll", "reasoning", "--json", "--server-template"]
    capsys.readouterr()
    assert main([*words, str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_answers"], report["num_differing_answers"]) == (299, 0)
    if style == "31b":  # whose answers stand behind an empty thought
        other = write_gguf(tmp_path / "other.gguf", template=newest_template("e4b"))
        assert main([*words, str(other)]) == 1
        assert json.loads(capsys.readouterr().out)["num_differing_answers"] > 0


def test_a_gguf_is_checked(tmp_path: Path, capsys: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", template=newest_template("e4b"))
    assert main(["check-model", str(path)]) == 0
    said = capsys.readouterr().out
    assert "gemma4 of 6 layers" in said
    assert "gemma4_v5" in said
    assert "llama-server --model" in said


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"template": None}, "tokenizer.chat_template", "absent"),
        ({"template": "{{ messages }}"}, "tokenizer.chat_template", "declares no tools"),
        (
            {"template": newest_template("e4b").replace("'<|tool_call>call:'", '"<|tool_call>call:"')},
            "",
            "llama.cpp knows",
        ),
        ({"visible": CONTROL}, "token_type", "of the type CONTROL"),
        ({"eos": 3}, "eos_token_id", "is 3, none of"),
    ],
)
def test_what_llama_cpp_stumbles_over_is_named(changes: dict[str, Any], where: str, what: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", **{"template": newest_template("e4b")} | changes)
    found = [one for one in check_gguf(path).faults if where in one.where and what in one.what]
    assert len(found) == 1


def test_what_is_no_gemma_4_or_no_whole_file_ends_with_2(tmp_path: Path, capsys: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", template=None, arch="llama")
    assert main(["check-model", str(path)]) == 2
    assert "general.architecture is 'llama'" in capsys.readouterr().err
    whole = write_gguf(tmp_path / "whole.gguf", template=newest_template("e4b")).read_bytes()
    end = whole.index(b"token_embd.weight")
    for length in (5, 20, 60, 200, end // 2, end - 100):
        path.write_bytes(whole[:length])
        assert main(["check-model", str(path)]) == 2
        assert "is not a whole GGUF file" in capsys.readouterr().err
    path.write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])
    assert main(["check-model", str(path)]) == 2
    assert "is not a whole GGUF file" in capsys.readouterr().err


def text_names(names: list[str]) -> list[str]:
    """The names of the language model's tensors as conversion/gemma.py of llama.cpp hands them to its map.

    It writes `router.scale` and `per_expert_scale` under names of its own.
    """
    found = []
    for name in names:
        if not name.startswith("model.language_model.") or name.endswith(("router.scale", "per_expert_scale")):
            continue
        name = name.replace("model.language_model.", "model.")
        ends = name.endswith("layer_scalar") or (".experts." in name and not name.endswith(".weight"))
        found.append(f"{name}.weight" if ends else name)
    return found


def projector_names(names: list[str]) -> list[str]:
    """Likewise those of the towers and projectors, which go into the file for `--mmproj`."""
    found = []
    for name in names:
        if name.startswith("model.language_model."):
            continue
        if "audio_tower" in name or "embed_audio" in name:
            name = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
            name += ".weight" if name.endswith(("per_dim_key_scale", "per_dim_scale")) else ""
        else:
            name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(
                ".linear.weight", ".weight"
            )
            name += ".weight" if name.endswith(("layer_scalar", "position_embedding_table")) else ""
        found.append(name)
    return found


@pytest.mark.parametrize("style", ["e2b", "e4b", "12b", "26b", "31b"])
def test_every_tensor_has_a_name_in_gguf(style: str, tiny_model: Callable[..., Path]) -> None:
    names = list(open_tensors(tiny_model(style) / "model.safetensors").entries)
    text = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 6)
    mapped = {name: text.get_name(name, try_suffixes=(".weight", ".bias")) for name in text_names(names)}
    assert [name for name, known in mapped.items() if known is None] == []
    assert len(set(mapped.values())) == len(mapped) > 60
    if style == "12b":  # whose embedder of images the package (0.19) does not know yet
        return
    ends = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")
    towers = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 6)
    mapped = {name: towers.get_name(name, try_suffixes=ends) for name in projector_names(names)}
    assert [name for name, known in mapped.items() if known is None] == []
    assert len(set(mapped.values())) == len(mapped) > 20


@pytest.mark.parametrize("style", ["e4b", "12b", "26b", "31b"])
def test_the_config_has_what_the_converter_asks_for(style: str, tiny_model: Callable[..., Path]) -> None:
    """The keys that conversion/gemma.py reads without a default: from 5.15 on, transformers leaves some of them out."""
    config = json.loads((tiny_model(style) / "config.json").read_text())
    text = config["text_config"]
    wanted: tuple[str, ...] = (
        "num_kv_shared_layers",
        "layer_types",
        "global_head_dim",
        "head_dim",
        "num_hidden_layers",
    )
    wanted += ("hidden_size", "intermediate_size", "sliding_window", "max_position_embeddings", "rms_norm_eps")
    assert [name for name in wanted if text.get(name) is None] == []
    full = text["rope_parameters"]["full_attention"]
    assert full["rope_type"] == "proportional"
    assert 0 < full["partial_rotary_factor"] <= 1
    assert config["architectures"][0] in ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")
    assert text["global_head_dim"] == 2 * text["head_dim"]
    assert text.get("num_global_key_value_heads") == (None if style == "e4b" else 1)
    if style == "12b":
        assert config["vision_config"]["mm_embed_dim"]
        assert config["audio_config"]["audio_embed_dim"]


def test_the_template_in_a_gguf_is_one_that_training_can_take(model: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", template=newest_template("31b"))
    encoder = load_encoder(model, EncodingConfig(chat_template=str(path)))
    assert encoder.processor.chat_template == newest_template("31b")
