"""What answering decision points costs: tokens read, answers a second, memory.

    python benchmarks/evaluation.py [--only tokens|speed|ranks|memory|reader] [--data FOLDER]

tokens: prompts of real trajectories, as one prompt after the other reads them, and as trees.
speed: `Generator` against `model.generate` for one prompt after the other, on the same decision points of real
trajectories, in turns and on the CPU clock; texts are compared.
ranks: `gemma-dist evaluate` on one process and on two.
reader: calls found in outputs of Gemma 4 (shared/conformance), by our reader and by TRL's.
memory: what keys and values take, of the released models (tests/shapes); tests/test_generate.py measures it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.ranks import gemma_dist  # noqa: E402 (found by the line above)

SOURCES = {"toolcalls/eval_multiturn.jsonl": 50, "multimodal/eval.jsonl": 12, "toolcalls/train.jsonl": 200}
ROWS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 8192, 512  # of the answers whose memory is shown
WIDE = 1024


def prompts_of(path: Path, encoder: Any, number: int) -> list[list[Any]]:
    """The prompts of the first trajectories of a file."""
    from gemma_dist.config import EvaluateConfig
    from gemma_dist.shards.reader import load_trajectories

    return [encoder.prompts(row) for row in islice(load_trajectories(path, EvaluateConfig()), number)]


def tokens(folder: Path, data: Path) -> None:
    """How often a token is read."""
    from gemma_dist.config import EvaluateConfig
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.evaluate.tree import grow_tree

    encoder = load_encoder(str(tiny(folder)), EvaluateConfig())
    print("\ntokens: read of the prompts of real trajectories, by a tiny tokenizer")
    titles = f"{'one by one':>12} {'distinct':>10} {'times':>6} {'tree':>10} {'times':>6}"
    print(f"  {'':32} {'rows':>5} {'points':>7} {titles}")
    for name, number in SOURCES.items():
        groups = prompts_of(data / name, encoder, number)
        asked = sum(len(prompt.input_ids) for prompt in chain.from_iterable(groups))
        distinct = sum(num_beginnings(prompts) for prompts in groups)
        read = sum(len(grow_tree(prompts)) for prompts in groups if prompts)
        points = sum(map(len, groups))
        shares = f"{asked:>12,} {distinct:>10,} {asked / distinct:>6.2f} {read:>10,} {read / distinct:>6.3f}"
        print(f"  {name:32} {len(groups):>5} {points:>7,} {shares}")


def num_beginnings(prompts: Sequence[Any]) -> int:
    """Distinct beginnings of the prompts: what must be read at least."""
    seen = set()
    for prompt in prompts:
        beginning = 0
        for token in prompt.input_ids:
            beginning = hash((beginning, token))
            seen.add(beginning)
    return len(seen)


def tiny(folder: Path, *, width: int = 128, depth: int = 6) -> Path:
    """A tiny E4B, made once for each size."""
    from gemma_dist.model.tiny import write_tiny_model

    model = folder / f"model-{width}-{depth}"
    if not model.exists():
        write_tiny_model(model, hidden_size=width, num_hidden_layers=depth)
    return model


def speed(folder: Path, data: Path) -> None:
    """Answers a second."""
    print("\nspeed: decision points of real trajectories, float32, one CPU thread")
    print(
        f"  {'':30} {'points':>7} {'tokens each':>12} {'one by one':>11} {'points/s':>9} {'Generator':>10} "
        f"{'points/s':>9} {'ratio':>6} {'same text':>10}"
    )
    wide = tiny(folder, width=WIDE, depth=4)
    for label, model, name, number, new in (
        ("tiny", tiny(folder), "toolcalls/eval_multiturn.jsonl", 4, 64),
        ("tiny, images", tiny(folder), "multimodal/eval.jsonl", 2, 64),
        (f"width {WIDE:,}", wide, "toolcalls/eval_multiturn.jsonl", 4, 32),
        (f"width {WIDE:,}, images", wide, "multimodal/eval.jsonl", 2, 32),
    ):
        race(label, model, data / name, number, new)


def race(label: str, model: Path, data: Path, number: int, new: int) -> None:
    """One row of `speed`."""
    import torch

    from gemma_dist.config import EvaluateConfig
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.evaluate.generate import Generator, Question
    from gemma_dist.evaluate.room import measure_room
    from gemma_dist.evaluate.sampling import Sampling
    from gemma_dist.gemma_format import STOP_TOKENS
    from gemma_dist.model.load import load_for_evaluation

    torch.set_num_threads(1)
    settings = EvaluateConfig()
    encoder, loaded = load_encoder(str(model), settings), load_for_evaluation(str(model), None)
    groups = prompts_of(data, encoder, number)
    stops = encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))

    start = time.process_time()
    alone = []
    for prompt in chain.from_iterable(groups):
        inputs = {"input_ids": torch.tensor([prompt.input_ids])}
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
        inputs |= {"mm_token_type_ids": torch.tensor([prompt.mm_token_type_ids])}
        inputs |= encoder.pixels(prompt.images) if prompt.images else {}
        with torch.inference_mode():
            written = loaded.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=stops)
        alone.append(written[0, len(prompt.input_ids) :].tolist())
    alone_s = time.process_time() - start

    start = time.process_time()
    questions = [[Question(prompt, f"{row} {prompt.turn}") for prompt in prompts] for row, prompts in enumerate(groups)]
    room = measure_room(loaded, settings.per_device_eval_batch_size, settings.max_batch_tokens)
    generator = Generator(loaded, encoder, Sampling(0, 1, 0, 0), room, max_new_tokens=new)
    found = {question.key: answer.ids for question, _, answer in generator.answer(questions)}
    together_s = time.process_time() - start

    together = [found[question.key] for question in chain.from_iterable(questions)]
    same = sum(first == second for first, second in zip(alone, together, strict=True))
    points = len(alone)
    print(
        f"  {label:30} {points:>7} {new:>12} {alone_s:>9.1f} s {points / alone_s:>9.2f} {together_s:>8.1f} s "
        f"{points / together_s:>9.2f} {alone_s / together_s:>6.1f} {same:>7}/{points}",
        flush=True,
    )


def ranks(folder: Path, data: Path) -> None:
    """Two processes against one."""
    model, name = tiny(folder, width=512, depth=4), data / "toolcalls/eval_multiturn.jsonl"
    print("\nranks: gemma-dist evaluate on 8 real trajectories, model of width 512, one CPU thread each")
    rates = {}
    for label, launch in (("1 process", None), ("2 processes", "cpu_ddp")):
        out = folder / f"ranks-{label[0]}"
        words = ["--model", model, "--data", name, "--out", out, "--limit", 8, "--max-new-tokens", 32]
        gemma_dist("evaluate", *words, launch=launch, timeout=3000)
        of_ranks = json.loads((out / "report.json").read_text())["times"]["ranks"]
        answers, seconds = sum(rank["answers"] for rank in of_ranks), max(rank["seconds"] for rank in of_ranks)
        rates[label] = answers / seconds
        each = ", ".join(f"{rank['answers']} in {rank['seconds']:.1f} s" for rank in of_ranks)
        print(f"  {label:12} {answers:>5} points {seconds:>8.1f} s {rates[label]:>8.2f} points/s   ({each})")
    first, second = ((folder / f"ranks-{number}" / "samples.jsonl").read_bytes() for number in (1, 2))
    print(f"  ratio {rates['2 processes'] / rates['1 process']:.2f}; samples.jsonl equal: {first == second}")


def memory(folder: Path, data: Path) -> None:
    """Keys and values."""
    from transformers import AutoConfig

    from gemma_dist.evaluate.room import CacheBytes

    mib = 2**20
    print(
        f"\nmemory: keys and values in bfloat16, MiB; {ROWS} answers of {ANSWER_TOKENS} tokens, to prompts of a tree "
        f"of {PROMPT_TOKENS:,}"
    )
    print(f"  {'':6} {'KiB a token, full':>18} {'sliding':>9} {'tree':>9} {'rows':>9} {'rows with prompts':>18}")
    for model in ("e2b", "e4b", "12b", "26b", "31b"):
        text = AutoConfig.from_pretrained(f"{ROOT}/tests/shapes/{model}.json").get_text_config()
        of = CacheBytes.of(text, 2)
        kib = f"{of.full / 1024:>18.0f} {of.sliding / 1024:>9.0f}"
        tree, rows = of.of_tree(PROMPT_TOKENS, PROMPT_TOKENS) / mib, of.of_rows(ROWS, ANSWER_TOKENS) / mib
        copies = of.of_rows(ROWS, PROMPT_TOKENS + ANSWER_TOKENS) / mib
        print(f"  {model:6} {kib} {tree:>9.0f} {rows:>9.0f} {copies:>18.0f}")


def reader(folder: Path, data: Path) -> None:
    """In how many outputs each reader finds the calls that are in them."""
    from transformers import AutoTokenizer
    from trl.chat_template_utils import add_response_schema, parse_response

    from gemma_dist.data.read import read_output

    tokenizer = add_response_schema(AutoTokenizer.from_pretrained(tiny(folder)))
    cases = json.loads((data.parent / "conformance" / "gemma4_toolcall_cases.json").read_text())
    found: dict[str, list[tuple[bool, bool]]] = {}
    for case in cases:
        before = case.get("prefix", "")
        ours = [{"name": call.name, "arguments": call.arguments} for call in read_output(case["output"], before).calls]
        ids, prefix = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (case["output"], before))
        opening = tokenizer("<|turn>model\n", add_special_tokens=False)["input_ids"]
        # It takes an output of no tokens for a batch of none.
        parsed = parse_response(tokenizer, ids, prefix=opening + prefix) if ids else {}
        theirs = [call["function"] for call in parsed.get("tool_calls") or []]
        accepted = [case["expected_calls"], *(one["calls"] for one in case.get("alternatives", []))]
        right = [any(same_calls(calls, answer) for answer in accepted) for calls in (ours, theirs)]
        found.setdefault(case["tier"], []).append((right[0], right[1]))
    print("\nreader: outputs whose calls are read right, every name and argument")
    print(f"  {'':12} {'outputs':>8} {'gemma_dist':>11} {'TRL':>6}")
    found["all"] = [one for tier in found.values() for one in tier]
    for tier, pairs in found.items():
        print(f"  {tier:12} {len(pairs):>8} {sum(one for one, _ in pairs):>11} {sum(one for _, one in pairs):>6}")


def same_calls(calls: Any, expected: Any) -> bool:
    """Equal as JSON: a number is one by its value, and true is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return ["number", float(value)] if type(value) in (int, float) else value

    calls, expected = ([[one["name"], plain(one["arguments"])] for one in some] for some in (calls, expected))
    return json.dumps(calls, sort_keys=True, default=str) == json.dumps(expected, sort_keys=True, default=str)


def main() -> None:
    parts = {"tokens": tokens, "speed": speed, "ranks": ranks, "memory": memory, "reader": reader}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Real trajectories.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        for name, part in parts.items():
            if arguments.only not in (None, name):
                continue
            if name != "memory" and not arguments.data.is_dir():
                print(f"{name}: skipped, no real trajectories at {arguments.data}; name their folder by --data")
            else:
                part(Path(folder), arguments.data)


if __name__ == "__main__":
    main()
