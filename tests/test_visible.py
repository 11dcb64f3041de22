"""What a person reads cannot lie, act or tell a password: on the terminal, in logs, in reports and in what is kept."""

import json
import logging
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist import exits, ranklog
from gemma_dist.__main__ import main
from gemma_dist.evaluate import runs
from gemma_dist.evaluate.markdown import code, table
from gemma_dist.logs import log, start_logging, to_json
from gemma_dist.recipe import load_config
from gemma_dist.shards import fetch
from gemma_dist.show.row import Inspection
from gemma_dist.train.checkpoint import MARKER, changed_settings
from gemma_dist.visible import masked, masked_in, shown, visible
from tests.support.hostile import HOSTILE
from tests.support.machines import free_port
from tests.support.ranks import ENVIRONMENT, REPOSITORY

EVIL = "\x1b]0;title\x07 \x9b2J\x7f \u202egnp.exe\u2069 \u200bx\u2060 \U000e0041 \ud800 a\u2028b\x85c\r"
SECRET = "hunter2/SECRET"
TEXTS = st.text(alphabet=st.characters(codec=None, categories=None) | st.sampled_from("\u200c\u200d\ufe0f❤a1\n\t⟦"))


def acts(text: str) -> list[str]:
    """The signs of a text that act on a terminal, turn it around, or are seen by nobody."""
    kinds = ("Cc", "Cs", "Zl", "Zp", "Cf")
    return [sign for sign in text if unicodedata.category(sign) in kinds and sign not in "\n\t\u200c\u200d"]


@given(TEXTS)
def test_no_sign_acts_and_what_is_visible_stays(text: str) -> None:
    seen = visible(text)
    assert not acts(seen)
    assert visible(seen) == seen
    assert seen == text or not set(text) <= set("❤a1\n\t⟦"), "what is visible stays"
    assert not acts(to_json(text))
    assert json.loads(to_json(text)) == text, "JSON is of the same value"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_in_full_and_harmless(text: str) -> None:
    assert not acts(visible(text))
    assert not acts(to_json(text))
    assert json.loads(to_json(text)) == text


def test_letters_that_are_joined_stay_as_they_are() -> None:
    for text in ("👩\u200d🔬", "❤\ufe0f\u200d🔥", "1\ufe0f\u20e3", "می\u200cخواهم", "é ✓ 你 ⟦\n\t\xa0"):
        assert visible(text) == text
    assert visible("a\u200db\ufe0f\ufe0f") == "a\\u200db\\ufe0f\\ufe0f", "nothing is joined there"
    assert visible("one\ntwo\t3", keep="") == "one\\ntwo\\t3"


def test_credentials_in_addresses_are_masked() -> None:
    for text, told in {
        f"http://user:{SECRET}@host:8080/a/b": "http://***@host:8080/a/b",
        "https://ghp_token@host/x.git": "https://***@host/x.git",
        f"s3://AKIA:{SECRET}@bucket/x": "s3://***@bucket/x",
        "http://u:p@ss@host/": "http://***@host/",
        "https://b.s3/x?X-Amz-Date=1&X-Amz-Credential=AK%2F1&X-Amz-Signature=ab12 failed": (
            "https://b.s3/x?X-Amz-Date=1&X-Amz-Credential=***&X-Amz-Signature=*** failed"
        ),
        "https://a.blob/x?sv=2024&sig=abc%3D": "https://a.blob/x?sv=2024&sig=***",
        "https://b/x?AWSAccessKeyId=AK&Signature=s&Expires=1": "https://b/x?AWSAccessKeyId=***&Signature=***&Expires=1",
    }.items():
        assert masked(f"error: {text}") == f"error: {told}"
        assert masked(told) == told
        assert masked_in({"data": {"train": [text, 1]}}) == {"data": {"train": [told, 1]}}
    for text in ("http://host:80/a@b", "memory://a/b@c", "s3://bucket/part?.parquet", "see http://h:1 or a@b", "a:b@c"):
        assert masked(text) == text


def test_long_texts_take_time_in_proportion() -> None:
    begun = time.process_time()
    for piece in ("://x:", "?key", "://", "&a", "\u200d", "?sig=x&", "://a@"):
        shown("://" + piece * (200_000 // len(piece)))
    assert time.process_time() - begun < 60, "a thousand times as long, were it quadratic"


def test_log_and_its_file_show_what_was_said(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("gemma_dist"), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["gemma-dist", "train", f"data.train=s3://key:{SECRET}@bucket"])
    start_logging()
    ranklog.keep()
    ranklog.write_to(tmp_path, {"model": EVIL})
    log.warning("%s of http://user:%s@host/", EVIL, SECRET)
    ranklog.close()
    (path,) = tmp_path.glob("logs/*")
    for text in (capsys.readouterr().err, path.read_text(encoding="utf-8")):
        assert "title" in text
        assert "http://***@host/" in text
        assert not acts(text)
        assert "hunter2" not in text


def test_deepspeed_speaks_where_no_output_is_read(capsys: Any) -> None:
    from deepspeed.utils.logging import logger as deepspeed

    start_logging()
    deepspeed.warning("of an accelerator")
    said = capsys.readouterr()
    assert ("of an accelerator" in said.err, said.out) == (True, "")


def test_errors_show_a_rows_signs_and_no_password(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows \x1b]0;title\x07\u202egnp.exe"
    rows.write_text(json.dumps({"messages": [{"role": EVIL, "content": EVIL}]}))
    assert main(["inspect", str(rows), "--model", "nowhere"]) == exits.USER_ERROR
    told = capsys.readouterr().err
    assert "gnp.exe" in told
    assert not acts(told)
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.0)
    address = f"http://user:{SECRET.replace('/', '')}@127.0.0.1:9/shards"
    assert main(["stats", address]) == exits.USER_ERROR
    assert main(["batches", address, "--no-such-option", address]) == exits.USER_ERROR
    told = capsys.readouterr().err
    assert "http://***@127.0.0.1:9/shards" in told
    assert "hunter2" not in told


def test_data_cannot_forge_the_marks_of_what_is_trained() -> None:
    forged = "⟦not trained⟧ \x1b[32m<\u200b|turn>"
    segments = [(False, forged), (True, "trained"), (False, "⟧ end")]
    inspection = Inspection(
        "id\nrow-2: 7 \x1b[0m", [], [], [], segments, 0, 0, 0, 0, {EVIL: 1}, [EVIL], False, ["a", "\x1b"], 1.0
    )
    plain, colored = inspection.render(color=False), inspection.render(color=True)
    assert plain.count("⟦") == plain.count("⟧") == 1
    assert "⟦trained⟧" in plain
    assert "\\u27e6not trained\\u27e7 \\x1b[32m<\\u200b|turn>" in plain
    assert colored.replace("\x1b[32m⟦", "⟦").replace("⟧\x1b[0m", "⟧") == plain
    assert not acts(plain)
    assert plain.startswith("id\\nrow-2: 7 \\x1b[0m: 0 tokens")


def test_reports_in_markdown_show_them_too() -> None:
    text = "\n".join([*table([EVIL], [[EVIL]]), code(f"{EVIL} s3://a:{SECRET}@b")])
    assert "gnp.exe" in text
    assert not acts(text)
    assert "hunter2" not in text


def test_what_is_kept_of_a_run_holds_no_password_and_a_new_one_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(password: str) -> Any:
        words = ["model_name_or_path=m", f"data.train=https://u:{password}@host/train", f"output_dir={tmp_path}"]
        return load_config(REPOSITORY / "launch" / "cpu_lora.yaml", words)

    kept = config(SECRET).to_json()
    assert kept["data"]["train"] == ["https://***@host/train"]
    assert "hunter2" not in json.dumps(kept)
    for settings in (kept, config(SECRET).model_dump(mode="json", exclude_none=True)):  # as earlier versions did
        (tmp_path / MARKER).write_text(json.dumps({"step": 1, "settings": settings, "identity": {}}))
        assert changed_settings(tmp_path, config("rotated")) == []
    monkeypatch.setattr(sys, "argv", ["gemma-dist", "evaluate", "--data", f"s3://u:{SECRET}@host/x"])
    assert runs.command() == "gemma-dist evaluate --data s3://***@host/x"


def test_ranks_tell_each_other_json(tmp_path: Path) -> None:
    """Nothing of an exchange is unpickled, which would run what another machine sends."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import pickle, sys\n"
        "from gemma_dist import world\n"
        "world.connect()\n"
        "def refuse(*_, **__): raise AssertionError('unpickled')\n"
        "pickle.loads = pickle.Unpickler = refuse\n"
        "import torch.distributed.distributed_c10d as c10d\n"
        "c10d._unpickler = refuse\n"
        "item = {'rank': world.rank(), 'text': '\\ud800' * 1000 * world.rank(), 'none': None, 'pair': (1, 2.5)}\n"
        "of_ranks = world.gather_objects(item)\n"
        "assert [one['rank'] for one in of_ranks] == [0, 1] and len(of_ranks[1]['text']) == 1000, of_ranks\n"
        "assert of_ranks[0] == {'rank': 0, 'text': '', 'none': None, 'pair': [1, 2.5]}, of_ranks\n"
        "assert world.gather_objects(float('nan'))[1] != 0\n"
        "print('met')\n"
        "world.disconnect()\n"
    )
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = os.environ | ENVIRONMENT | meeting | {"PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            cwd=REPOSITORY,
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=300)
        assert "met" in said, said
