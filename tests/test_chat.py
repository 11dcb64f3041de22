"""Talking to a model: its prompts are training's, its calls run when the user agrees, and what is saved is a row."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gemma_dist.__main__ import main
from gemma_dist.chat.conversation import Conversation
from gemma_dist.chat.run import Talk
from gemma_dist.chat.screen import Screen
from gemma_dist.chat.tools import Tools, as_result, load_tools, run
from gemma_dist.config import ShardConfig
from gemma_dist.config_chat import ChatConfig
from gemma_dist.data.encode import Prompt, load_encoder
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import parse_row
from gemma_dist.evaluate.generate import Answer
from gemma_dist.gemma_format import RESPONSE, TURN_END
from gemma_dist.show.prompts import check_prompts
from gemma_dist.visible import visible
from tests.support.corpus import picture
from tests.support.ranks import ENVIRONMENT, REPOSITORY, long

MY_TOOLS = '''
from PIL import Image

def plot(n: int):
    """Draw a chart.

    Args:
        n: How many bars.
    """
    return [f"chart {n}", Image.new("RGB", (48, 64), (n, 40, 200))]

def fail(text: str) -> str:
    """Fail.

    Args:
        text: What to say.
    """
    raise KeyError(text)

def bare(x):
    return x

several = [plot, fail]
'''
CALL = "<|tool_call>call:plot{n:3}<tool_call|>" + RESPONSE
SAID = "Here is the chart." + TURN_END


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of tools, importable while these tests run."""
    made = tmp_path_factory.mktemp("mine")
    (made / "my_tools.py").write_text(MY_TOOLS)
    return made


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


class Script:
    """In the place of the model: answers that are given, one after the other, and the prompts that it saw."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.prompts = list(answers), list[Prompt]()

    def answer(self, prompt: Prompt, show: Callable[[str], None]) -> Answer | None:
        self.prompts.append(prompt)
        text = self.answers.pop(0)
        if text == "^C":
            return None
        for end in range(1, len(text) + 1):
            show(text[:end])
        return Answer(text, [0] * len(text), text.endswith((RESPONSE, TURN_END)))


@pytest.fixture
def talk(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, Talk, Script]]:
    """What a conversation shows: lines that are typed, answers of the model."""

    def hold(
        lines: Sequence[str], answers: Sequence[str] = (), tools: str | None = None, yes: bool = False, **settings: Any
    ) -> tuple[str, Talk, Script]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        config, known = ChatConfig(**settings), Tools() if tools is None else load_tools(tools)
        conversation = Conversation(config, config.enable_thinking is True, known.declared)
        script: Any = Script(answers)
        held = Talk(conversation, known, load_encoder(model, config), script, Screen(), ask_first=not yes)
        held.go()
        assert not script.answers, "the conversation ended before"
        return capsys.readouterr().out, held, script

    return hold


# ---- the ids of training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_those_of_training_and_what_is_saved_is_a_row_that_shard_takes(
    talk: Any, model: str, thinking: bool, tmp_path: Path
) -> None:
    """With pictures of the user and of a tool, two calls at once, a system message, thoughts, and control tokens."""
    (tmp_path / "a.png").write_bytes(picture(7))
    thought = "Think.<channel|>" if thinking else ""
    lines = ["/system Be brief.", f"/image {tmp_path / 'a.png'}", "Draw <turn|> this, \\", "please."]
    lines += [
        "And twice?",
        f"/save {tmp_path / 'saved.jsonl'}",
        f"/save {tmp_path / 'saved.jsonl'}",
        "/quit",
        "not read",
    ]
    answers = [
        f"<|channel>thought\n{thought}{CALL}" if thinking else CALL,
        SAID,
        CALL.replace(RESPONSE, "") + CALL,
        SAID,
    ]
    if thinking:
        answers[1] = f"It is drawn.<channel|>{SAID}"
        answers[3] = f"Again.<channel|>{SAID}"
    _, held, script = talk(lines, answers, "my_tools:plot", yes=True, enable_thinking=thinking)
    assert [len(prompt.images) for prompt in script.prompts] == [1, 2, 2, 4]

    raw = list(read_rows([tmp_path / "saved.jsonl"]))
    assert [row["id"] for _, row in raw if isinstance(row, dict)] == ["saved-1", "saved-2"]
    encoder = load_encoder(model, ShardConfig())
    trajectory = parse_row(raw[0][1], "saved.jsonl:1", ShardConfig())
    assert trajectory.messages == parse_row(held.conversation.row("x"), "x", ShardConfig()).messages
    again = encoder.prompts(trajectory)
    assert [prompt.text for prompt in script.prompts] == [prompt.text for prompt in again]
    assert [prompt.input_ids for prompt in script.prompts] == [prompt.input_ids for prompt in again]
    assert [prompt.mm_token_type_ids for prompt in script.prompts] == [prompt.mm_token_type_ids for prompt in again]
    assert [prompt.images for prompt in script.prompts] == [prompt.images for prompt in again]
    if not thinking:  # with thoughts, training shows those of the last user turn alone
        assert not check_prompts(tmp_path / "saved.jsonl", model, None, ShardConfig(), None).differences
    words = [str(tmp_path / "saved.jsonl"), "--model", model, "--out", str(tmp_path / "shards"), "--num-workers", "1"]
    assert main(["shard", *words]) == 0


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_a_function_runs_when_the_user_agrees(talk: Any) -> None:
    lines = ["Draw.", "what?", "y", "Again.", "n", "no chart", "Again.", "a", "Again.", "/quit"]
    shown, held, _ = talk(lines, [CALL, SAID] * 4, "my_tools:plot")
    assert shown.count('→ plot {"n": 3}') == 4
    assert shown.count("← chart 3 [1 images]") == 3
    assert "← no chart" in shown
    results = [message["content"] for message in held.conversation.messages if message["role"] == "tool"]
    assert [isinstance(content, list) for content in results] == [True, False, True, True]


def test_without_functions_the_user_types_the_answer(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(7))
    declared = [{"name": "plot", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}]
    (tmp_path / "tools.json").write_text(json.dumps(declared))
    lines = ["Draw.", "/image nowhere.png", f"/image {tmp_path / 'a.png'}", "a chart", "/quit"]
    shown, _, script = talk(lines, [CALL, SAID], str(tmp_path / "tools.json"))
    assert "nowhere.png" in shown
    assert script.prompts[1].images == [picture(7)]
    assert 'response:plot{value:<|"|>a chart' in script.prompts[1].text


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('call:plot{n:<|"|>many<|"|>}', "Error: n: 'many' is not of type 'integer'"),
        ("call:plot{}", "Error: as a whole: 'n' is a required property"),
        ("call:other{n:1}", "Error: there is no tool other; there are: plot, fail"),
        ('call:fail{text:<|"|>why<|"|>}', "Error: KeyError: 'why'"),
    ],
)
def test_errors_are_fed_back(talk: Any, call: str, told: str) -> None:
    answers = [f"<|tool_call>{call}<tool_call|>{RESPONSE}", SAID]
    shown, held, script = talk(["Go.", "/quit"], answers, "my_tools:several", yes=True)
    assert f"← {told}" in shown
    assert held.conversation.messages[2]["content"] == told
    assert told in script.prompts[1].text
    is_mistake = not told.startswith("Error: KeyError")
    assert held.conversation.messages[1].get("train", True) is not is_mistake


def test_calls_without_end_are_ended(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_dist.chat.run.MOST_ROUNDS", 3)
    shown, _, script = talk(["Go.", "/quit"], [CALL] * 3, "my_tools:plot", yes=True)
    assert "stopped after 3 rounds of calls" in shown
    assert len(script.prompts) == 3


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("<|tool_call>call:plot{n:(3}<tool_call|>" + RESPONSE, "holds a call that cannot be read"),
        ("<|tool_call>call:plot{n:", "written, cut off at max_new_tokens"),
        (TURN_END, "says nothing"),
        ("^C", "stopped: the answer is not kept"),
    ],
)
def test_what_is_no_answer_is_not_kept(talk: Any, answer: str, told: str) -> None:
    shown, held, script = talk(["Go.", "Again.", "/quit"], [answer, SAID], "my_tools:plot")
    assert told in shown
    assert [message["role"] for message in held.conversation.messages] == ["user", "user", "assistant"]
    assert "Go." in script.prompts[1].text


def test_an_answer_that_is_cut_off_is_kept_and_not_trained(talk: Any) -> None:
    shown, held, _ = talk(["Go.", "/save x.jsonl", "/quit"], ["Here is"])
    assert "cut off at max_new_tokens" in shown
    assert held.conversation.messages[1] == {"role": "assistant", "content": "Here is", "train": False}
    assert "no assistant message is trained" in shown
    assert not Path("x.jsonl").exists()


# ---- what is typed ---------------------------------------------------------------------------------------------------


def test_commands_that_are_wrong_change_nothing(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        "/image",
        f"/image {tmp_path / 'text.png'}",
        "/image /nowhere",
        "/image ~nobody-of-this-name/x.png",
        "/image a\0b.png",
        "/save",
        "/save x.jsonl",
        "/what",
        "",
        "/help",
    ]
    shown, held, _ = talk(lines)
    assert held.conversation.messages == []
    for told in (
        "name a picture",
        "does not decode",
        "/nowhere",
        "~nobody-of-this-name/x.png",
        "name a file",
        "nothing to save",
        "/what is no command",
    ):
        assert told in shown


def test_a_conversation_begins_again(talk: Any) -> None:
    lines = ["/system A.", "One.", "/system B.", "Two.", "/reset", "//three", "/quit"]
    _, held, script = talk(lines, [SAID] * 3)
    assert [text in script.prompts[1].text for text in ("A.", "B.", "One.", "Two.")] == [False, True, True, True]
    assert held.conversation.messages[0] == {"role": "user", "content": "/three"}
    assert "One." not in script.prompts[2].text


def test_no_escape_reaches_the_terminal(talk: Any) -> None:
    """Of the model, of what it calls, of a tool's answer, or of an error."""
    evil = "\x1b]0;title\x07\x9b2J\r\u202egnp.exe"
    assert visible(evil) == "\\x1b]0;title\\x07\\x9b2J\\r\\u202egnp.exe"
    assert visible("é ✓ 你\n\t👩\u200d🔬\xa0") == "é ✓ 你\n\t👩\u200d🔬\xa0"
    call = f'<|tool_call>call:fail{{text:<|"|>{evil}<|"|>}}<tool_call|>{RESPONSE}'
    shown, _, _ = talk(
        ["Go.", "/quit"], [call, f"<|channel>thought\n{evil}<channel|>{evil}{TURN_END}"], "my_tools:several", yes=True
    )
    assert "title" in shown
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e")


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nowhere.json", "neither a file nor MODULE:FUNCTION"),
        ("my_tools", "neither a file nor MODULE:FUNCTION"),
        ("my_tools:nothing", "cannot be loaded: AttributeError"),
        ("no_such_module:f", "cannot be loaded: ModuleNotFoundError"),
        ("my_tools:MY", "cannot be loaded"),
        ("my_tools:__name__", "neither a function nor a list"),
        ("my_tools:bare", "the tool bare cannot be declared"),
        ("broken.json", "write a list of declarations as JSON"),
    ],
)
def test_tools_that_are_none_are_refused(
    given: str, told: str, folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.json").write_text("[{")
    assert main(["chat", model, "--tools", given]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_what_a_function_returns_is_text_or_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(7))
    shot = Image.new("RGB", (48, 48))
    assert as_result("x").text == "x"
    assert as_result({"t": 20}).text == '{"t": 20}'
    assert as_result(None).text == "null"
    assert as_result(["a", 1]).text == '["a", 1]'
    assert as_result(tmp_path / "a.png").images == (picture(7),)
    both = as_result(["see", shot, tmp_path / "a.png"])
    assert (both.text, len(both.images)) == ("see", 2)
    assert Image.open(io.BytesIO(both.images[0])).size == (48, 48)
    assert run(lambda: tmp_path / "b.png", {}).text.startswith("Error: FileNotFoundError")
    assert run(sys.exit, {}).text.startswith("Error: SystemExit")

    async def later(x: int) -> int:
        return x + 1

    assert run(later, {"x": 1}).text == "2"


# ---- the command itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A tiny E4B that has learned one conversation by heart: a question, a call, a picture, an answer."""
    from gemma_dist.model.load import load_for_evaluation
    from gemma_dist.model.tiny import write_tiny_model

    out = tmp_path_factory.mktemp("drawer") / "model"
    write_tiny_model(out, style="e4b", num_hidden_layers=4)
    sys.path.insert(0, str(folder))
    conversation = Conversation(ChatConfig(), thinking=False, declared=load_tools("my_tools:plot").declared)
    sys.path.remove(str(folder))
    file = io.BytesIO()
    Image.new("RGB", (48, 64), (12, 40, 200)).save(file, "PNG")
    image = {"type": "image", "image": {"bytes": file.getvalue()}}
    call = {"id": "call_0", "type": "function", "function": {"name": "plot", "arguments": {"n": 12}}}
    messages: list[Any] = [
        {"role": "user", "content": "Draw 12 bars."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": [{"type": "text", "text": "chart 12"}, image]},
        {"role": "assistant", "content": "Here are 12 bars: étude ✓."},
    ]
    row = {"messages": messages, "tools": conversation.declared}
    trajectory = parse_row(row, "row", ChatConfig())
    encoder = load_encoder(str(out), ChatConfig())
    encoded = encoder.encode(trajectory)
    batch = {name: torch.tensor([getattr(encoded, name)]) for name in ("input_ids", "mm_token_type_ids", "labels")}
    model = load_for_evaluation(str(out), None, ple_on_host=False).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        loss = model(**batch, **encoder.pixels(trajectory.images)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    model.save_pretrained(out)
    return out


def start(folder: Path, *words: object, **pipes: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "gemma_dist", "chat", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def test_a_model_that_was_trained_calls_a_function_and_says_what_it_saw(
    drawer: Path, folder: Path, tmp_path: Path
) -> None:
    """The real command, piped: its prompts being those of training, it says what it has learned."""
    pipe = subprocess.PIPE
    lines = f"Draw 12 bars.\n/save {tmp_path / 'saved.jsonl'}\n"
    with start(folder, drawer, "--tools", "my_tools:plot", "--yes", stdin=pipe, stdout=pipe, stderr=pipe) as process:
        shown, errors = (text.decode() for text in process.communicate(lines.encode()))
    assert process.returncode == 0, errors
    assert '→ plot {"n": 12}\n' in shown
    assert "← chart 12 [1 images]\n" in shown
    assert "\nHere are 12 bars: étude ✓.\n" in shown
    row = json.loads((tmp_path / "saved.jsonl").read_text())
    assert row["messages"][-1] == {"role": "assistant", "content": "Here are 12 bars: étude ✓."}


@long
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(model: str, folder: Path, tmp_path: Path) -> None:
    """In a terminal, with random weights that cannot stop."""
    endless = tmp_path / "endless"
    shutil.copytree(model, endless)
    settings = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(
        json.dumps(settings | {"suppress_tokens": settings["eos_token_id"]})
    )
    ours, its = pty.openpty()
    words = (endless, "--max-new-tokens", 8000, "--temperature", 1)
    process = start(folder, *words, stdin=its, stdout=its, stderr=its)
    os.close(its)
    seen = b""

    def read_until(mark: bytes) -> None:
        nonlocal seen
        while mark not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            seen += os.read(ours, 1 << 16)
        seen = seen[seen.index(mark) + len(mark) :]

    try:
        read_until(b"you> ")
        os.write(ours, b"Hello\n")
        read_until(b"Hello\r\n")
        while len(seen) < 200:
            seen += os.read(ours, 1 << 16)
        os.kill(process.pid, signal.SIGINT)
        read_until(b"the answer is not kept")
        read_until(b"you> ")
        while process.poll() is None:  # readline may miss one that comes in the moment in which it shows the prompt
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(ours)
