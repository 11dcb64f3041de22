"""`gemma-dist serve`: what it becomes, what it refuses, and the calls that its server reads."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.gemma_format import CALL, CALL_END, QUOTE, RESPONSE
from gemma_dist.serving.transformers_serve import know_calls

for package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)


def test_it_becomes_the_server(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The process itself; what it prints is what it becomes, and every further word goes on."""
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    words = ["--port", "0", "--dtype", "bfloat16", "--chat-template-kwargs", '{"enable_thinking": true}']
    main(["serve", model, *words])
    assert became == [[sys.executable, "-P", "-m", "gemma_dist.serving.transformers_serve", model, *words]]
    printed = capsys.readouterr().out
    assert model in printed
    assert "'{\"enable_thinking\": true}'" in printed


def adapter_alone(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def own_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gemma4", "auto_map": {"AutoModel": "own.Model"}}')


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda folder: None, "cannot be read"),
        (adapter_alone, "gemma-dist merge"),
        (another_model, "model_type 'llama'"),
        (own_code, "code of its own"),
    ],
)
def test_what_cannot_be_served_is_refused(
    prepare: Callable[[Path], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it became a server"))
    prepare(tmp_path)
    assert main(["serve", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_an_option_in_the_models_place_is_named(capsys: Any) -> None:
    assert main(["serve", "--port", "8000"]) == 2
    assert "gemma-dist serve MODEL --port" in capsys.readouterr().err


def test_no_code_of_the_current_folder_is_run(model: str, tmp_path: Path) -> None:
    """Which is the model's own for who types `gemma-dist serve .` there."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for name in ("fastapi", "typer", "yaml"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    own_folder_left_out = "import sys\nsys.path[:] = filter(None, sys.path)\n"
    start = f"from gemma_dist.serving.serve import serve\n{own_folder_left_out}serve('.', ['--help'])"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", start], cwd=folder, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0
    assert not (tmp_path / "ran").exists()


def test_a_package_that_is_missing_is_named(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("gemma_dist.serving.serve.NEEDED", ("fastapi", "not_installed_here"))
    assert main(["serve", model]) == 2
    assert "serving needs not_installed_here: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
@pytest.mark.parametrize("name", ["plot", "my-plot", "files.read/all", "mcp:search"])
def test_calls_of_any_name_and_model_are_read(
    model_type: str, name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in pieces of any size, as tokens come."""
    from transformers import AutoTokenizer
    from transformers.cli.serving import utils
    from transformers.utils.chat_parsing import ResponseParser

    monkeypatch.setattr(utils, "_RESPONSE_TEMPLATE_FALLBACKS", copy.deepcopy(utils._RESPONSE_TEMPLATE_FALLBACKS))
    know_calls()
    served: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = utils.get_response_template(tokenizer, served)
    arguments = f"{{path:{QUOTE}a{{b}}, c{QUOTE},n:3}}"
    text = f"Wait.{CALL}call:{name}{arguments}{CALL_END}{CALL}call:{name}{{}}{CALL_END}{RESPONSE}"
    for width in (1, 3, len(text)):
        parser = ResponseParser(template, prefix="<|turn>model\n")
        for begin in range(0, len(text), width):
            parser.feed(text[begin : begin + width])
        found, _ = parser.finalize()
        calls = [one["function"] for one in found["tool_calls"]]
        assert [one["name"] for one in calls] == [name, name]
        assert [one["arguments"] for one in calls] == [{"path": "a{b}, c", "n": 3}, {}], json.dumps(calls)
