"""Rollouts for trainers elsewhere: the ids that were sampled, behind what they were sampled behind, and no others."""

import json
import random
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import pytest

from gemma_dist.__main__ import main
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.runs import with_repeats, without_repeats
from gemma_dist.export.rollouts import NAMES, Layout, export_rollouts, read_rollouts, require_sampled, rollouts_of
from tests.support.ranks import long

Step = tuple[list[int], list[int]]


def run(steps: list[Step], number: int = 1, task: str = "t", **keys: Any) -> dict[str, Any]:
    made = [
        {"prompt_ids": prompt, "completion_ids": sampled, "logprobs": None, "num_images": 0}
        for prompt, sampled in steps
    ]
    told = {"id": f"{task}/run-{number}", "task": task, "outcome": "success", "reward": 1.0}
    return told | {"steps": made} | keys


def write(folder: Path, *runs: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    return folder


def some_run(source: random.Random, number: int) -> dict[str, Any]:
    """Steps of random ids: most prompts begin with all that came before, some with another beginning."""
    steps: list[Step] = []
    seen = source.choices(range(9), k=3)
    for _ in range(source.randint(1, 5)):
        sampled = source.choices(range(9), k=source.randint(1, 4))
        steps.append((list(seen), sampled))
        seen = [*seen, *sampled, *source.choices(range(9), k=source.randint(0, 3))]
        if source.random() < 0.3:
            seen[source.randrange(len(seen))] = 99  # a thought that is no longer shown, say
    return run(steps, number, task=f"t{number % 7}", reward=float(number % 2))


WHOLE = run([([1, 2], [3, 4]), ([1, 2, 3, 4, 50, 51], [5])])
CUT = run([([1, 2], [3, 4]), ([1, 2, 4, 50], [5]), ([1, 2, 4, 50, 5, 6], [7])], 2, reward=0.0)


def test_steps_that_continue_one_another_are_one_rollout_and_others_are_cut() -> None:
    (one,), why = rollouts_of(WHOLE)
    assert (one.prompt_ids, one.completion_ids, one.mask) == ([1, 2], [3, 4, 50, 51, 5], [1, 1, 0, 0, 1])
    assert (one.num_steps, one.num_parts, why) == (2, 1, "")
    (first, second), why = rollouts_of(CUT)
    assert (first.prompt_ids, first.completion_ids, first.mask) == ([1, 2], [3, 4], [1, 1])
    assert (second.prompt_ids, second.completion_ids, second.mask) == ([1, 2, 4, 50], [5, 6, 7], [1, 0, 1])
    assert [(each.part, each.num_parts, each.first_step, each.reward) for each in (first, second)] == [
        (1, 2, 1, 0.0),
        (2, 2, 2, 0.0),
    ]
    assert (
        why == "t/run-2: the prompt of step 2 is another than what was read and sampled before it, from token 3 of 4 on"
    )


def test_logprobs_stand_at_what_was_sampled() -> None:
    known = json.loads(json.dumps(WHOLE))
    known["steps"][0]["logprobs"], known["steps"][1]["logprobs"] = [-1.0, -2.0], [-3.0]
    (one,), _ = rollouts_of(known)
    assert one.logprobs == [-1.0, -2.0, 0.0, 0.0, -3.0]
    known["steps"][1]["logprobs"] = None
    assert rollouts_of(known)[0][0].logprobs is None, "those of a part would pass for those of the whole"


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_ids_out_are_the_ids_in(tmp_path: Path, layout: Layout, suffix: str) -> None:
    source = random.Random(7)
    runs = [some_run(source, number) for number in range(300)]
    out = tmp_path / f"rollouts{suffix}"
    report = export_rollouts(write(tmp_path / "runs", *runs), out, layout, whole=False)
    assert report.num_runs == 300
    assert 0 < report.num_cut < 300
    names = NAMES[layout]
    rows = list(read_rollouts(out))
    sampled: dict[str, list[int]] = {}
    for row in rows:
        ids, mask = row[names["completion_ids"]], row[names["mask"]]
        sampled.setdefault(row["run"], []).extend(one for one, is_sampled in zip(ids, mask, strict=True) if is_sampled)
    assert sampled == {
        each["id"]: [one for step in each["steps"] for one in step["completion_ids"]] for each in runs
    }, "each once, in order"
    assert report.num_sampled == sum(map(len, sampled.values()))

    # The check that the command makes finds a change of any kind.
    for name, change in (("prompt_ids", 1), (names["completion_ids"], 1), (names["mask"], -1)):
        damaged = json.loads(json.dumps(rows))
        damaged[5][name][-1] = abs(damaged[5][name][-1] + change)
        bad = tmp_path / f"{name}.jsonl"
        bad.write_text("".join(json.dumps(row) + "\n" for row in damaged))
        with pytest.raises(DataError, match="are not what it sampled"):
            require_sampled(bad, tmp_path / "runs/runs.jsonl", layout, ".jsonl")


def test_what_cannot_be_handed_over_is_refused_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shows_image = run([([1], [2])], 3)
    shows_image["steps"][0]["num_images"] = 1
    folder = write(tmp_path / "runs", WHOLE, CUT, shows_image, run([([1], [2])], 4, reward=None))
    assert main(["export-rollouts", str(folder), "--out", str(tmp_path / "all.parquet")]) == 0
    told = capsys.readouterr().out
    assert "3 rollouts of 2 runs; 7 ids sampled, 3 between" in told
    assert "1 tasks with 2 runs each; in 1 the rewards differ" in told
    assert "1 runs are cut into several rollouts, such as t/run-2: the prompt of step 2" in told
    assert "1 runs left out: they show images" in told
    assert "1 runs left out: they have no reward" in told
    assert main(["export-rollouts", str(folder), "--out", str(tmp_path / "whole.jsonl"), "--whole"]) == 2
    assert not list(tmp_path.glob("*whole*")), "nothing, and no temporary file"
    assert f"{folder}/runs.jsonl:2: t/run-2: the prompt of step 2" in capsys.readouterr().err

    served = run([([1], [2])])
    served["steps"][0]["completion_ids"] = None
    with pytest.raises(DataError, match=r"written by a server, which told no ids.*let the model act here$"):
        export_rollouts(write(tmp_path / "served", served), tmp_path / "x.jsonl", "trl", whole=False)
    with pytest.raises(DataError, match="1 have no reward"):
        export_rollouts(
            write(tmp_path / "none", run([([1], [2])], reward=None)), tmp_path / "x.jsonl", "trl", whole=False
        )
    with pytest.raises(ConfigError, match="exists already"):
        export_rollouts(folder, tmp_path / "all.parquet", "trl", whole=False)
    with pytest.raises(ConfigError, match=r"ends in \.parquet or \.jsonl"):
        export_rollouts(folder, tmp_path / "all.csv", "trl", whole=False)


def test_a_line_that_repeats_nothing_says_the_same(tmp_path: Path) -> None:
    source = random.Random(3)
    whole = [some_run(source, number) for number in range(50)]
    short = [{**each, "steps": without_repeats(each["steps"])} for each in whole]
    assert [with_repeats(each["steps"]) for each in short] == [each["steps"] for each in whole]
    of_whole = WHOLE["steps"][1]["prompt_ids"]
    assert without_repeats(WHOLE["steps"])[1] == {**WHOLE["steps"][1], "prompt_start": 4, "prompt_ids": of_whole[4:]}
    files = [tmp_path / f"{name}.jsonl" for name in ("whole", "short")]
    for file, runs in zip(files, (whole, short), strict=True):
        export_rollouts(write(tmp_path / file.stem, *runs), file, "trl", whole=False)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_line_that_act_does_not_write_is_refused_by_its_place(tmp_path: Path) -> None:
    good = run([([1], [2])])
    (step,) = good["steps"]
    damaged: dict[str, Any] = {
        "no run of": 5,
        "id is 5": {**good, "id": 5},
        "reward is nan": {**good, "reward": float("nan")},
        "reward is 'x'": {**good, "reward": "x"},
        "steps is None": {**good, "steps": None},
        "step 1 has no prompt_ids": {**good, "steps": [{}]},
        "completion_ids of step 1": {**good, "steps": [{**step, "completion_ids": [2**40]}]},
        "prompt_start of step 1 is 1, of 0": {**good, "steps": [{**step, "prompt_start": 1}]},
        "logprobs of step 1": {**good, "steps": [{**step, "logprobs": []}]},
    }
    for number, (told, line) in enumerate(damaged.items()):
        runs = write(tmp_path / f"runs-{number}", good, line)
        with pytest.raises(DataError, match=rf"^{runs}/runs.jsonl:2: .*{told}"):
            export_rollouts(runs, tmp_path / "x.parquet", "trl", whole=False)
    assert not list(tmp_path.glob("*x.parquet*"))


@long
def test_trl_trains_on_the_ids_of_the_file(tmp_path: Path, model: str) -> None:
    """As docs/rollouts.md says it: the batch of GRPOTrainer holds ids, mask and rewards of the file."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    source = random.Random(3)
    runs = [some_run(source, number) for number in range(14)]
    export_rollouts(write(tmp_path / "runs", *runs), tmp_path / "rollouts.parquet", "trl", whole=False)
    rows = [row for row in read_rollouts(tmp_path / "rollouts.parquet") if row["num_parts"] == 1]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    by_task = {task: found for task, found in by_task.items() if len(found) == 2}
    assert len(by_task) >= 2
    next_of = {task: cycle(found) for task, found in by_task.items()}
    batches: list[dict[str, Any]] = []

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        found = [next(next_of[task]) for task in prompts]
        names = ("prompt_ids", "completion_ids", "env_mask", "reward")
        return {name: [row[name] for row in found] for name in names} | {"logprobs": None}

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            batches.append(batch)
            return batch

    args = GRPOConfig(output_dir=str(tmp_path / "out"), num_generations=2, per_device_train_batch_size=4, max_steps=1,
                      use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)  # fmt: skip
    trainer = Watched(
        model=AutoModelForImageTextToText.from_pretrained(model),
        reward_funcs=[lambda completions, reward, **_: reward],
        rollout_func=rollout_func,
        processing_class=AutoProcessor.from_pretrained(model),
        train_dataset=Dataset.from_list([{"prompt": task} for task in by_task]),
        args=args,
    )
    trainer.train()
    batch = batches[0]
    trained = set()
    for place in range(4):
        prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
        is_there = batch["completion_mask"][place].bool()
        ids, mask = (batch[name][place][is_there].tolist() for name in ("completion_ids", "tool_mask"))
        trained.add((tuple(prompt), tuple(ids), tuple(mask)))
    of_file = {
        (tuple(row["prompt_ids"]), tuple(row["completion_ids"]), tuple(row["env_mask"]))
        for found in by_task.values()
        for row in found
    }
    assert len(trained) == 4
    assert trained <= of_file
