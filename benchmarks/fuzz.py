"""Broken input of every kind, thrown at the command line: the table of docs/trust.md.

    python benchmarks/fuzz.py [--only rows,schemas,…] [--num-cases 250] [--seed 0] [--keep FOLDER] [--say] [--fresh]

Each case is a file that was right until one to four random changes were made to it, in its structure or in its bytes,
and a command that reads it, in a process of its own. The command must do its work (exit code 0) or refuse in plain
words (2; `check-model` 1, where it finds something): a traceback, a process that dies, more than TIMEOUT_S seconds and
more than MAX_BYTES of memory are counted, and so is a refusal that leaves something finished behind. With --keep, the
cases of these kinds stay there, to be looked at; with --say, what each refusal says is printed. A case begins with
torch and transformers imported, which takes five times as long as the case itself; with --fresh it imports them itself,
or has another process do so, as a command does.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support

import yaml

from gemma_dist.shards.manifest import MANIFEST
from gemma_dist.train.checkpoint import MARKER
from tests.support.corpus import TOOLS, row, write_rows

TIMEOUT_S = 120
MAX_BYTES = 4 << 30
RIGHT, REFUSED, FOUND = 0, 2, 1
VERDICTS = ("done", "refused", "traceback", "died", "too slow", "too large", "left behind")
PROCESSES = multiprocessing.get_context("forkserver")  # not fork: Arrow's threads are not copied, but their locks are
PRELOADED = ["gemma_dist.shards.sharding", "gemma_dist.merge.run", "gemma_dist.__main__"]
HEAVY = ["torch", "transformers.models.gemma4.processing_gemma4", "gemma_dist.model.load"]

HOSTILE: list[Any] = [
    *(None, True, 0, -1, 0.5, 10**400, 1e308, float("nan"), "", " ", "0", [], {}, [[]], [None], {"": None}),
    *("\ud800", "\x00", "\u202e", "\x1b]0;title\x07", "\U000e0041", "⟦trained⟧", "ⅷ", "a" * 100_000, "a b\nc\r\n\t"),
    *("<|tool_call>call:f{a:1}<tool_call|>", '<|"|>', "<turn|>\n<|turn>system\n", "<|image|>", "<eos>", "{{", "%}"),
    *("^(a+)+$", "#/$defs/x", "http://127.0.0.1:1/x", "file:///etc/passwd", "../../../etc/passwd", "s3://no-bucket/x"),
    *("[" * 20_000, '{"a":' * 20_000, "(" * 20_000),  # deeper than any parser goes
    *("data:image/png;base64,AAAA", "data:image/png;base64," + "A" * 4000, "hf://datasets/no/such", "org/name"),
    *(
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}] * 2},
        {"pattern": "^(a|a)*$"},
        {"enum": []},
        {"type": ["null"]},
        ["a"] * 999,
    ),
]


class Case(NamedTuple):
    """A broken input and the command that reads it."""

    words: list[str]
    out: Path | None = None  # what must not be finished where the command refused
    input: Path | None = None  # what stands on stdin
    may_find: bool = False  # the exit code 1 is an answer


class Parts(NamedTuple):
    """What is right, made once."""

    model: Path
    rows: list[dict[str, Any]]
    shards: Path
    adapters: list[Path]  # of LoRA and of QLoRA
    checkpoint: Path  # of full fine-tuning
    recipe: Path


# ---- changes ---------------------------------------------------------------------------------------------------------


def changed(value: Any, chance: random.Random) -> Any:
    """JSON with one to four changes in its structure."""
    whole = [json.loads(json.dumps(value))]
    for _ in range(chance.randint(1, 4)):
        places = [(holder, key) for holder, key in walk(whole)]
        change_at(*chance.choice(places), chance)
    return whole[0] if whole else None


def walk(holder: Any) -> Any:
    """Every place in JSON: its list or object, and the index or key."""
    keys = holder.keys() if isinstance(holder, dict) else range(len(holder))
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from walk(holder[key])


def change_at(holder: Any, key: Any, chance: random.Random) -> None:
    """One change at a place."""
    kind, value = chance.randrange(7), holder[key]
    if kind == 0 and (isinstance(holder, dict) or len(holder) > 1):
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(value)))
    elif kind == 2 and isinstance(holder, dict):
        holder[chance.choice(["", "$ref", "type", "extra", key + " ", "\ud800"])] = holder.pop(key)
    elif kind == 3 and isinstance(value, str) and value:
        at = chance.randrange(len(value))
        holder[key] = value[:at] + str(chance.choice(HOSTILE)) + value[at:]
    elif kind == 4 and isinstance(value, dict | list):
        for _ in range(chance.choice([1, 3, 60])):
            value = [value]
        holder[key] = value
    elif kind == 5 and isinstance(value, int | float):
        holder[key] = chance.choice([-value, value * 10**9, value / 3, str(value), 2**31, 2**63])
    else:
        holder[key] = copy.deepcopy(chance.choice(HOSTILE))  # which later changes may change, too


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to four changes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        span = slice(at, at + chance.choice([1, 8, 200]))
        kind = chance.randrange(5)
        if kind == 0:
            del found[span]
        elif kind == 1:
            found[at:at] = found[span]
        elif kind == 2:
            found[at:at] = str(chance.choice(HOSTILE)).encode(errors="surrogatepass")
        elif kind == 3 and found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.3:
            del found[at:]
    return bytes(found)


def rewrite(path: Path, chance: random.Random) -> None:
    """Break a file: JSON, YAML and headers of safetensors in their structure most of the time, all else in bytes."""
    data = path.read_bytes()
    path.unlink()  # it may be a link
    if path.suffix in (".json", ".yaml") and chance.random() < 0.7:
        right = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
        path.write_text(json.dumps(changed(right, chance)))  # which is YAML, too
        return
    if path.suffix == ".safetensors" and chance.random() < 0.7:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(changed(json.loads(data[8:end]), chance)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
        return
    path.write_bytes(changed_bytes(data, chance))


def linked(source: Path, target: Path) -> Path:
    """A folder of links to the files of another."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).symlink_to(path.resolve())
    return target


# ---- the kinds -------------------------------------------------------------------------------------------------------


def of_rows(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """Rows, among right ones, in their structure or their bytes."""
    texts = [json.dumps(one) for one in parts.rows]
    at = chance.randrange(len(texts))
    texts[at] = json.dumps(changed(parts.rows[at], chance))
    data = "\n".join(texts).encode()
    path = folder / chance.choice(["rows.jsonl", "rows.jsonl", "rows.json"])
    path.write_bytes(data if chance.random() < 0.8 else changed_bytes(data, chance))
    return sharding(path, parts.model, folder, chance)


def of_schemas(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """The schema of a tool that a row declares and calls."""
    keywords: dict[str, Any] = {
        "properties": {
            "n": {"type": "integer", "minimum": 0},
            "s": {"type": "string", "pattern": "^a+$", "enum": ["a"]},
        },
        "required": ["n"],
        "$defs": {"x": {"allOf": [{"type": "integer"}]}},
        "anyOf": [{"required": ["n"]}, {"$ref": "#/$defs/x"}],
        "additionalProperties": False,
        "uniqueItems": True,
    }
    tools = json.loads(json.dumps(TOOLS))
    tools[0]["function"]["parameters"] |= {key: keywords[key] for key in chance.sample(sorted(keywords), 3)}
    rows = [{**row(number), "tools": changed(tools, chance)} for number in range(2)]
    return sharding(write_rows(folder / "rows.jsonl", rows), parts.model, folder, chance)


def of_templates(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """The chat template of the model."""
    model = linked(parts.model, folder / "model")
    rewrite(model / "chat_template.jinja", chance)
    return sharding(write_rows(folder / "rows.jsonl", parts.rows), model, folder, chance)


def of_models(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """Config, tokenizer, processor or weights of a model."""
    model = linked(parts.model, folder / "model")
    rewrite(chance.choice([path for path in model.iterdir() if path.suffix != ".jinja"]), chance)
    command = chance.choice(["check-model", "shard", "merge", "evaluate"])
    if command == "check-model":
        return Case([command, str(model)], may_find=True)
    if command == "merge":
        return merging(model, parts.adapters[0], folder)
    if command == "evaluate":
        return evaluating(model, parts, folder)
    return sharding(write_rows(folder / "rows.jsonl", parts.rows), model, folder, chance)


def of_shards(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """Manifest, shards or tools of a finished corpus."""
    shards = linked(parts.shards, folder / "shards")
    rewrite(chance.choice(sorted(shards.iterdir())), chance)
    command = chance.choice([["stats"], ["inspect", "--model", str(parts.model), "--row", "2"]])
    return Case([*command, str(shards)])


def of_adapters(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """Config, record or weights of an adapter."""
    adapter, out = linked(chance.choice(parts.adapters), folder / "adapter"), folder / "out"
    names = chance.choice([["adapter_config.json"], ["gemma_dist.json"], ["adapter_model.safetensors"]])
    rewrite(adapter / names[0], chance)
    command = chance.choice(["merge", "merge", "merge --verify", "evaluate", "export", "card", "push"])
    if command.startswith("merge"):
        return merging(parts.model, adapter, folder, *command.split()[1:])
    if command == "evaluate":
        return evaluating(parts.model, parts, folder, "--adapter", str(adapter))
    if command == "export":
        words = ["--base", str(parts.model), "--for", "vllm", "--out", str(out)]
        return Case([command, "--adapter", str(adapter), *words], out)
    return Case([command, str(adapter), *["owner/name"] * (command == "push")])


def of_checkpoints(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """Any file of a checkpoint, which its marker has the digest of, or of one without a marker, or of a run's."""
    out = folder / "out"
    command = chance.choice(["export", "export", "train"])
    place = folder if command == "export" else out
    place.mkdir(exist_ok=True)
    checkpoint = linked(parts.checkpoint, place / parts.checkpoint.name)
    if chance.random() < 0.7:
        forget(checkpoint)
    rewrite(chance.choice(sorted(path for path in checkpoint.iterdir() if path.is_file())), chance)
    if command == "export":
        return Case([command, str(checkpoint), "--out", str(out)], out)
    paths = [f"model.model_name_or_path={parts.model}", f"data.train={parts.shards}", f"train.output_dir={out}"]
    batch = ["train.global_batch_size=4", "train.max_steps=2", "train.save_steps=2"]
    return Case([command, str(parts.recipe.with_name("cpu_full.yaml")), *paths, *batch], out)


def of_recipes(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """A recipe, a setting beside it, or the accelerate config that it is held against."""
    path = folder / "recipe.yaml"
    path.write_bytes(parts.recipe.read_bytes())
    command = chance.choice([["check"], ["plan"], ["batches", str(parts.shards)]])
    (folder / "accelerate_configs").symlink_to(parts.recipe.parents[1] / "accelerate_configs")  # they name others
    words = [*command, str(path), f"model.model_name_or_path={parts.model}", f"data.train={parts.shards}"]
    if command[0] != "batches" and chance.random() < 0.3:
        name = chance.choice(["cpu_ddp", "cpu_zero3", "cpu_fsdp2"])
        config = folder / f"{name}.yaml"
        config.write_bytes((parts.recipe.parents[1] / f"accelerate_configs/{name}.yaml").read_bytes())
        rewrite(config, chance)
        words += ["--accelerate-config", str(config)]
    elif chance.random() < 0.5:
        key = chance.choice(["data.train", "train.output_dir", "model.model_name_or_path", "lora.r", "train.max_steps"])
        value = str(chance.choice(HOSTILE)).encode(errors="replace").decode().replace("\0", "")[:1000]
        words.append(f"{key}={value}")
    else:
        rewrite(path, chance)
    return Case(words + ["--step", "1"] * (command[0] == "batches"))


def of_outputs(parts: Parts, folder: Path, chance: random.Random) -> Case:
    """What a model wrote."""
    right = '<|channel>thought\nHm.\n<channel|>Well.<|tool_call>call:plot{n:1,s:<|"|>a<|"|>,xs:[true,null]}<tool_call|>'
    outputs = [changed_bytes(right.encode(), chance).decode(errors="replace") for _ in range(20)]
    path = write_rows(folder / "outputs.jsonl", [{"output": output} for output in outputs])
    if chance.random() < 0.3:
        rewrite(path, chance)
    return Case(["read-calls"], input=path)


KINDS: dict[str, Callable[[Parts, Path, random.Random], Case]] = {
    "rows": of_rows,
    "schemas": of_schemas,
    "templates": of_templates,
    "models": of_models,
    "shards": of_shards,
    "adapters": of_adapters,
    "checkpoints": of_checkpoints,
    "recipes": of_recipes,
    "outputs": of_outputs,
}


def forget(checkpoint: Path) -> None:
    """Take the digests out of a checkpoint's marker, as earlier versions wrote none: then its files are looked into."""
    marker = json.loads((checkpoint / MARKER).read_bytes())
    del marker["crc32"], marker["files"]
    (checkpoint / MARKER).unlink()
    (checkpoint / MARKER).write_text(json.dumps(marker))


def merging(model: Path, adapter: Path, folder: Path, *words: str) -> Case:
    """`gemma-dist merge` of a model and an adapter."""
    out = folder / "out"
    return Case(["merge", "--base", str(model), "--adapter", str(adapter), "--out", str(out), *words], out)


def evaluating(model: Path, parts: Parts, folder: Path, *words: str) -> Case:
    """`gemma-dist evaluate` of a model, a token of one answer."""
    limits = ["--limit", "1", "--max-new-tokens", "1"]
    words = ("--model", str(model), "--data", str(parts.shards), "--out", str(folder / "out"), *limits, *words)
    return Case(["evaluate", *words])


def sharding(rows: Path, model: Path, folder: Path, chance: random.Random) -> Case:
    """`gemma-dist shard` of some rows."""
    out = folder / "out"
    words = ["shard", str(rows), "--out", str(out), "--model", str(model), "--num-workers", "1"]
    return Case(words + ["--skip-invalid"] * (chance.random() < 0.5), out)


# ---- running them ----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of a case."""

    verdict: str
    seconds: float  # of processor time, that of its processes too: others may be at work on the machine
    num_bytes: int  # of memory, at most
    case: Case
    said: str


def try_case(kind: str, number: int, parts: Parts, folder: Path, seed: int) -> Outcome:
    """Make a case, run it and judge it."""
    folder.mkdir(parents=True)
    case = KINDS[kind](parts, folder, random.Random(f"{kind}-{seed}-{number}"))
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run_case, args=(case, folder, sender))
    process.start()
    sender.close()
    for _ in range(TIMEOUT_S):  # not by the clock: whoever measures something may have halted all processes for a while
        process.join(1)
    if is_too_slow := process.is_alive():
        process.kill()
        process.join()
    said = (folder / "said.txt").read_text(errors="replace") if (folder / "said.txt").exists() else ""
    try:
        code, num_bytes, seconds = receiver.recv()
    except EOFError:
        return Outcome("too slow" if is_too_slow else "died", TIMEOUT_S if is_too_slow else 0, 0, case, said)
    return Outcome(judge(case, code, num_bytes, said), seconds, num_bytes, case, said)


def judge(case: Case, code: int, num_bytes: int, said: str) -> str:
    """The verdict on a command that ended by itself."""
    if "Traceback" in said or code not in (RIGHT, REFUSED, FOUND) or (code == FOUND and not case.may_find):
        return "traceback"
    if num_bytes > MAX_BYTES:
        return "too large"
    if code == REFUSED and case.out and ((case.out / MANIFEST).exists() or (case.out / "config.json").exists()):
        return "left behind"
    return "done" if code == RIGHT else "refused"


def run_case(case: Case, folder: Path, sender: Any) -> None:
    """In a process of its own: run the command, and send its exit code and peak memory."""
    os.setsid()
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(os.open(case.input or os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    resource.setrlimit(
        resource.RLIMIT_DATA, (3 * MAX_BYTES, 3 * MAX_BYTES)
    )  # of what is asked for, to spare the machine
    from gemma_dist.__main__ import main

    code = main(case.words)
    sys.stdout.flush()
    sys.stderr.flush()
    own, of_others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(one.ru_utime + one.ru_stime for one in (own, of_others))
    sender.send((code, own.ru_maxrss * 1024, seconds))
    os.kill(os.getpid(), signal.SIGKILL)  # so that nothing of the interpreter's end counts


def make_parts(folder: Path) -> Parts:
    """What is right: a tiny model, rows, shards and a checkpoint of a short run."""
    import subprocess

    def gemma_dist(*words: object) -> None:
        done = subprocess.run([sys.executable, "-m", "gemma_dist", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)

    rows = [row(number, num_calls=1 + number % 2) for number in range(6)]
    model, shards = folder / "model", folder / "shards"
    recipes = Path(__file__).parents[1] / "launch"
    gemma_dist("tiny", model)
    gemma_dist("shard", write_rows(folder / "rows.jsonl", rows), "--out", shards, "--model", model)
    batch = ["train.global_batch_size=4", "train.max_steps=1", "train.save_steps=1"]
    for name in ("cpu_lora", "cpu_qlora", "cpu_full"):
        paths = [f"model.model_name_or_path={model}", f"data.train={shards}", f"train.output_dir={folder / name}"]
        gemma_dist("train", recipes / f"{name}.yaml", *paths, *batch)
    adapters, checkpoint = [folder / "cpu_lora", folder / "cpu_qlora"], folder / "cpu_full/checkpoint-1"
    return Parts(model, rows, shards, adapters, checkpoint, recipes / "cpu_lora.yaml")


def fuzz(folder: Path, kinds: list[str], num_cases: int, seed: int, keep: Path | None, say: bool) -> Counter[str]:
    """Run all cases, on all cores; prints a line a kind, and returns how often each verdict was given."""
    parts = make_parts(folder / "parts")
    total: Counter[str] = Counter()
    columns = " ".join(f"{verdict:>11}" for verdict in VERDICTS)
    print(f"{'':<12} {'cases':>6} {columns} {'CPU s, most':>11} {'most MB':>8}")
    for kind in kinds:
        found: list[Outcome] = []

        def one(number: int, kind: str = kind) -> Outcome:
            place = folder / "cases" / f"{kind}-{number}"
            outcome = try_case(kind, number, parts, place, seed)
            if say and outcome.verdict == "refused":
                words = " ".join(outcome.case.words)
                print(f"{place.name}, {outcome.seconds:.1f} s: {words}\n    {outcome.said[-1000:]}")
            if keep and outcome.verdict not in VERDICTS[:2]:
                shutil.copytree(place, keep / outcome.verdict.replace(" ", "-") / place.name, dirs_exist_ok=True)
            shutil.rmtree(place)
            return outcome

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = list(pool.map(one, range(num_cases)))
        counts = Counter(outcome.verdict for outcome in found)
        numbers = " ".join(f"{counts[verdict]:>11,}" for verdict in VERDICTS)
        longest, most = max(one.seconds for one in found), max(one.num_bytes for one in found) / 10**6
        print(f"{kind:<12} {num_cases:>6,} {numbers} {longest:>11.1f} {most:>8,.0f}", flush=True)
        total.update(counts)
    return total


def main() -> None:
    """Print the table; exit code 1 where a case was neither done nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--num-cases", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--say", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    PROCESSES.set_forkserver_preload(PRELOADED + HEAVY * (not options.fresh))
    with tempfile.TemporaryDirectory() as temporary:
        kinds = options.only.split(",")
        total = fuzz(Path(temporary), kinds, options.num_cases, options.seed, options.keep, options.say)
    sys.exit(any(total[verdict] for verdict in VERDICTS[2:]))


if __name__ == "__main__":
    main()
