"""The contract of the command line: quick help, exit codes, and errors without tracebacks."""

import json
import os
import subprocess
import sys

import pytest

from gemma_dist import __version__
from gemma_dist.__main__ import KEPT, main
from gemma_dist.cli import cli
from gemma_dist.errors import CheckpointError, DataError, PeerError

VERBS = [
    *("doctor", "init", "recipes", "tiny", "shard", "inspect", "stats", "check-prompts", "check", "plan", "batches"),
    *("health", "train", "plot", "evaluate", "score", "compare", "read-calls", "act", "chat", "merge", "export"),
    *("export-rollouts", "extract"),
    *("check-model", "card", "serve", "push"),
]
RECIPE = "tuning: full\nmodel: {model_name_or_path: m}\ndata: {train: d}\ntrain: {output_dir: o}\n"


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from gemma_dist.__main__ import KEPT, main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'pyarrow', 'yaml', 'PIL'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_a_whole_first_sentence(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out
    assert not cli.commands[verb].get_short_help_str(64).endswith("...")


def test_settings_are_offered_with_the_defaults_of_config(capsys):
    from gemma_dist.config import ShardConfig

    main(["shard", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ShardConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join((field.description or "").split()) in text
    assert "[default: 50000000]" in text


def test_old_words_for_a_value_are_taken(tmp_path, capsys):
    rows = tmp_path / "rows.txt"
    rows.touch()
    words = ["inspect", str(rows), "--model", "m", "--control-tokens"]
    main([*words, "neutralise"])
    assert "unknown kind of file" in capsys.readouterr().err
    main([*words, "other"])
    assert "'other' is not one of 'reject', 'escape'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shrad"], "No such command 'shrad'"),
        (["shard", "nowhere.jsonl", "--out", "o", "--model", "m"], "nowhere.jsonl: no such file"),
        (["shard", "recipe.yaml", "--out", "o"], "Missing option '--model'"),
        (["inspect", "recipe.yaml", "--model", "m", "--row", "0"], "rows are counted from 1, as in messages, not 0"),
        (["inspect", "recipe.yaml", "--model", "m", "--row", "1", "--id", "a"], "name one row"),
        (["inspect", "nowhere.jsonl", "--model", "m", "--row", "1"], "nowhere.jsonl: no such file"),
        (["batches", "-", "recipe.yaml", "--step", "0"], "steps are counted from 1, as in messages, not 0"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", "recipe.yaml", "--learning-rate", "1e-4"], "write key=value"),
        (["train", "recipe.yaml", "cutoff_len=8"], "give --max-length to `gemma-dist shard`"),
        (["check", "recipe.yaml", "global_batch_size=3", "--world-size", "2"], "use 2 or 4"),
        (["shard", "recipe.yaml", "--out", "o", "--model", "m", "--max-length", "0"], "--max-length 0"),
        (
            ["evaluate", "--model", "m", "--data", "recipe.yaml", "--out", "o", "--max-new-tokens", "0"],
            "--max-new-tokens 0",
        ),
        (["merge", "--base", "b", "--adapter", "nowhere", "--out", "o"], "'nowhere' does not exist"),
        (["merge", "--base", "b", "--adapter", ".", "--out", "o", "--base-weights", "x"], "'x' is not one of"),
        (["merge", "--base", "b", "--adapter", ".", "--out", "o", "--max-shard-size", ""], "--max-shard-size has no"),
        (["shard", "recipe.yaml", "--model", "m", "--out="], "--out has no value; write one"),
        (["plot", "recipe.yaml", "", "--out", "o"], "an argument is empty; write one"),
        (["evaluate", "--model", "m", "--data", "recipe.yaml", "--out", "o", "--num-samples", "3"], "0.0: it would"),
        (["inspect", "~/nowhere.jsonl", "--model", "m"], "HOME/nowhere.jsonl: no such file"),
        (["check", "."], ".: a folder; name a recipe"),
        (["check", "empty"], "empty: it says nothing; a recipe is a YAML file"),
        (["plan", "e4b_qlora_16g"], "no such file; did you mean e4b_qlora_16gb?"),
        (["check", "recipe.yaml", "tuning=lora", "data.train=corpus"], "these do: corpus/held_out, corpus/train; name"),
        (
            ["check", "recipe.yaml", "tuning=lora", "data.train=corpus/train,corpus/held_out"],
            "as a list: [corpus/train,",
        ),
        (["shard", "corpus/train", "--model", "recipe.yaml", "--out", "o"], "'recipe.yaml' is a file; name the folder"),
        (
            ["shard", "recipe.yaml", "--model", "corpus", "--out", "o"],
            "'corpus' holds no config.json nor any other file",
        ),
        (
            ["shard", "recipe.yaml,empty", "--model", "m", "--out", "o"],
            "no such file, but without commas there is; write blanks between",
        ),
        (["serve", "recipe.yaml"], "is a file; name the folder of a model"),
        (["init", "o", "--model", "m", "--data", "corpus", "--num-gpus", "0"], "corpus: neither finished shards"),
        (
            ["init", "o", "--model", "m", "--data", "recipe.yaml", "--num-gpus", "0"],
            "recipe.yaml: unknown kind of file",
        ),
        (["merge", "--base", "b", "--adapter", ".=x", "--out", "o"], "write FOLDER, or FOLDER=0.5"),
        (["score", "--from", "corpus", "--out", "o"], "or another folder is meant, that `evaluate` or `score` wrote"),
        (["score", "--from", "acted", "--out", "o"], "acted holds runs of `act`, which were judged as they"),
        (["card", "--evaluation=~/nowhere", "."], "Path 'HOME/nowhere' does not exist"),
    ],
)
def test_what_the_user_can_fix_ends_with_2_and_no_traceback(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "HOME")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name in ("empty", "acted/runs.jsonl", "corpus/train/manifest.arrow", "corpus/held_out/manifest.arrow"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


RUN = ["--model", "m", "--data", "recipe.yaml", "--out", "o"]
ADAPTER = ["export", "--adapter", ".", "--base", "m", "--for", "vllm", "--out", "o"]
PLAN = ["plan", "recipe.yaml", "tuning=lora", "model_name_or_path=google/gemma-4-E2B-it"]
CPU = ["init", "o", "--model", "m", "--data", "recipe.yaml", "--num-gpus", "0"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["act", "--replay", *RUN, "--unfit-calls", "run"], "--unfit-calls says nothing where --replay is given"),
        (["act", "--replay", *RUN, "--unfit-calls", "refuse"], "--unfit-calls says nothing where --replay is given"),
        (["act", "--replay", *RUN, "--tool-timeout-s", "5"], "--tool-timeout-s says nothing where --replay"),
        (["act", "--replay", *RUN, "--declare", "rows"], "--declare says nothing where --replay is given"),
        (["act", "--replay", *RUN, "--max-steps", "5"], "--max-steps says nothing where --replay is given"),
        (["act", "--replay", *RUN, "--unroll", "reasoning"], "--unroll says nothing of own runs"),
        (["act", "--replay", *RUN, "--top-k", "5"], "--top-k says nothing at a temperature of 0; give --temperature 1"),
        (["chat", "m", "--unroll", "reasoning"], "--unroll says nothing of a conversation"),
        (["chat", "m", "--top-p", "0.5"], "--top-p says nothing at a temperature of 0; give --temperature 1"),
        (["evaluate", *RUN, "--top-p", "0.5"], "--top-p says nothing at a temperature of 0; give --temperature 1"),
        (["evaluate", *RUN, "--server", "http://localhost:1/v1", "--loss"], "--loss says nothing where --server is"),
        (["inspect", ".", "--model", "m", "--html", "a.html", "--json"], "--json says nothing where --html is given"),
        (["inspect", ".", "--model", "m", "--too-long", "drop"], "--too-long says nothing without --max-length"),
        (["shard", ".", "--model", "m", "--out", "o", "--too-long", "drop"], "--too-long says nothing without --max-"),
        (["merge", "--base", "m", "--adapter", ".", "--out", "o", "--verify-samples", "3"], "without --verify-data"),
        ([*ADAPTER, "--dtype", "float32"], "--dtype says nothing where --adapter is given"),
        ([*ADAPTER, "--max-shard-size", "5GB"], "--max-shard-size says nothing where --adapter is given"),
        (["init", "o", "--from", "recipe.yaml", "--tuning", "full"], "--tuning says nothing where --from is given"),
        ([*CPU, "--gpu-memory", "24GB"], "--gpu-memory says nothing of a CPU (--num-gpus 0)"),
        ([*PLAN, "--tokens-per-image", "70"], "--tokens-per-image 70 says nothing of a micro-batch without images"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def fail_with(error: BaseException, monkeypatch) -> int:
    """The exit code of a verb that raises `error`."""

    def raise_it(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(cli.commands["read-calls"], "callback", raise_it)
    return main(["read-calls"])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (DataError("a.jsonl:3: turn 2: no"), 2, False),
        (FileNotFoundError(2, "No such file or directory", "a.parquet"), 2, False),
        (OSError(28, "No space left on device"), 2, False),
        (OSError(27, "File too large"), 2, False),
        (OSError(5, "Input/output error"), 74, False),
        (caused(CheckpointError("rank 1 could not write"), OSError(5, "Input/output error")), 74, False),
        (caused(CheckpointError("rank 1 could not write"), OSError(28, "No space left on device")), 2, False),
        (PeerError("another rank says it"), 143, False),
        (OSError(116, "Stale file handle", "out/a"), 74, False),
        (FileExistsError(17, "File exists", "run"), 2, False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, False),  # as safetensors words it
        (RuntimeError("Bad file descriptor (os error 9)"), 1, True),
        (OSError(9, "Bad file descriptor"), 1, True),
        (KeyboardInterrupt(), 130, False),
        (ValueError("ours"), 1, True),
        (AssertionError("ours"), 1, True),
        (OSError("nobody knows"), 1, True),
    ],
)
def test_exit_codes_tell_users_errors_from_bugs(error, code, traceback, monkeypatch, capsys):
    assert fail_with(error, monkeypatch) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == traceback
    assert ("This is a bug" in said) == traceback


@pytest.mark.parametrize("verb", ["read-calls", "shard"])
def test_an_interrupt_says_what_is_kept_and_how_to_go_on(verb, monkeypatch, capsys):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands[verb], "callback", interrupt)
    more = {"read-calls": [], "shard": ["a.jsonl", "--out", "o", "--model", "m"]}[verb]
    assert main([verb, *more]) == 130
    kept = {"read-calls": "nothing was written", "shard": "the pieces that were done are kept in the folder of --out"}
    assert f"interrupted: {kept[verb]}" in capsys.readouterr().err
    assert set(KEPT) <= set(cli.commands)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device; make room there"),
        (OSError(28, "No space left on device", "out/a"), "error: out/a: No space left on device; make room there"),
        (OSError(28, "No space left on device", "in/a", None, "out/a"), "error: out/a: No space left on device; make"),
        (OSError(27, "File too large", "out/a"), "error: out/a: File too large; raise `ulimit -f`"),
        (OSError(2, "No such file or directory", "a"), "error: a: No such file or directory\n"),
    ],
)
def test_an_error_of_the_disk_names_the_file_that_was_written(error, told, monkeypatch, capsys):
    assert fail_with(error, monkeypatch) == 2
    assert capsys.readouterr().err.startswith(told)


def test_each_of_several_ranks_says_its_error_with_its_number(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fail_with(ValueError("ours"), monkeypatch) == 1
    assert all(line.startswith("[rank 3] ") for line in capsys.readouterr().err.splitlines())


def test_the_module_runs_as_a_program_too():
    lines = json.dumps({"output": "hello"}) + "\n"
    result = subprocess.run(
        [sys.executable, "-m", "gemma_dist", "read-calls"], input=lines, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["content"] == "hello"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_read_calls_reads_and_prints_every_text(locale):
    """In UTF-8 whatever the locale, line by line at line feeds alone, half a surrogate pair included."""
    outputs = ["a\u2028b\u2029c\x85d é", '<|tool_call>call:f{a:"\\ud83d"}<tool_call|>']
    lines = "".join(json.dumps({"output": output}, ensure_ascii=False) + "\r\n" for output in outputs)
    lines += json.dumps({"output": "half \ud83d"})
    words = [sys.executable, "-m", "gemma_dist", "read-calls"]
    environment = {**os.environ, "LC_ALL": locale}
    result = subprocess.run(words, input=lines.encode(), capture_output=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    first, second, third = map(json.loads, result.stdout.decode().splitlines())
    assert first["content"] == outputs[0]
    assert second["calls"] == [{"name": "f", "arguments": {"a": "\ud83d"}}]
    assert third["content"] == "half \ud83d"

    broken = subprocess.run(words, input=b'{"output": "ok"}\n{"output": "\xff"}', capture_output=True, env=environment)
    assert broken.returncode == 2
    assert b"stdin:2: not JSON ('utf-8' codec can't decode byte 0xff" in broken.stderr
