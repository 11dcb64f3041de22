"""What a run of `evaluate` leaves in its folder while it works, so that a killed one goes on where it was.

    OUT/run.json              what the run is: model, data, settings; another one is refused where answers are
    OUT/.samples-RANK.jsonl   each rank's lines, appended as they come; gone when the report is written
    OUT/.loss-RANK.jsonl      what gold costs at its points, likewise

Lines are not scored yet: answers belong to the log, rules to the report. A line is known by its key, a hash of all that
its answer hangs on, and by the number of its sample. So it counts for any number of ranks, and what is not exactly this
run's is never taken for it. A last line that was torn by the kill is left out and cut off.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from gemma_dist import world
from gemma_dist.config import RowConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.errors import ConfigError, EvaluationError, GemmaDistError, PeerError
from gemma_dist.evaluate.decision import AnsweredDecision, KindLoss
from gemma_dist.evaluate.runs import RUNS, SAMPLES
from gemma_dist.files import exclusive
from gemma_dist.logs import log, write_json
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.shards.reader import is_shard_folder, open_shards

RUN = "run.json"
RUNS_PART = "runs"  # what ranks of `act` write there, whose folder is made as one of an evaluation
# Settings on which no answer hangs, and names of what a hash tells better.
MAY_DIFFER = (
    *("per_device_eval_batch_size", "max_batch_tokens", "ple", "answer_tolerance", "loss"),
    *("probes", "general"),  # which ask more, and nothing else of what is asked anyway
)
NAMES = {"model": "model_hash", "adapter": "adapter_hash", "data": "data_hash"}
NUM_NAMED = 5  # of many points, in messages

T = TypeVar("T")
LineKey = tuple[str, int]  # key of the point, number of the sample from 0
Lines = dict[LineKey, AnsweredDecision]
Losses = dict[str, dict[str, KindLoss] | None]  # key of the point -> by kind; None: gold is no whole answer


def describe_run(
    model: str, adapter: Path | None, data: Path, limit: int | None, encoder: Encoder, settings: RowConfig
) -> dict[str, Any]:
    """What an evaluation is, as run.json holds it. Raises CheckpointError: there is no model in safetensors."""
    return {
        "model": model,
        "model_hash": "-".join(fingerprint_base(model).values()),
        "adapter": None if adapter is None else str(adapter),
        "adapter_hash": None if adapter is None else hash_adapter(adapter),
        "data": str(data),
        "data_hash": hash_data(data),
        "limit": limit,
        "encoding": encoder.fingerprint,
        "settings": settings.model_dump(mode="json", exclude=set(MAY_DIFFER)),
    }


def key_of(run: Mapping[str, Any], place: str, prompt: Any, images: Sequence[bytes]) -> str:
    """What a decision point of a run is known by: a hash of everything that its answer hangs on, and of its place in
    the data.

    Args:
        prompt: what is asked, as JSON: token ids, or messages and tools.
    """
    hashed = hashlib.sha256(place.encode())
    kept = {name: value for name, value in run.items() if name not in (*NAMES, "limit", "data_hash", "server")}
    hashed.update(json.dumps(kept, sort_keys=True).encode())
    hashed.update(json.dumps(prompt).encode())
    for image in images:
        hashed.update(hashlib.sha256(image).digest())
    return hashed.hexdigest()[:16]


@contextlib.contextmanager
def opened(out: Path, describe: Callable[[], dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Lines]]:
    """Within, `out` is this run's; yields what `describe` says and the lines that ranks wrote before. Every rank calls
    it.

    Raises:
        ConfigError: `out` holds answers of a run of something else, which the message names, or another is at work
            there.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> dict[str, Any]:
            problem = f"{out}: another evaluation is writing there; wait for it, or name another folder"
            is_new = not out.exists()
            stack.enter_context(exclusive(out, problem))
            if is_new:
                stack.enter_context(_removed_if_empty(out))
            run = describe()
            if (out / RUN).is_file() and _holds_any(out):
                _require_same(out, json.loads((out / RUN).read_text(encoding="utf-8")), run)
            else:
                write_json(out / RUN, run)
            return run

        run = on_rank_0(begin)
        lines = read_lines(out)
        if lines and world.rank() == 0:
            log.info("%s holds %d answers of a run that ended early", out, len(lines))
        yield run, lines


@contextlib.contextmanager
def _removed_if_empty(out: Path) -> Iterator[None]:
    """Within, an error takes away `out`, which this run has made, unless it holds an answer by then."""
    try:
        yield
    except BaseException:
        if not _holds_any(out):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _holds_any(out: Path) -> bool:
    """Whether an evaluation, or `act`, has left something there."""
    ended = any((out / name).is_file() for name in (SAMPLES, RUNS))
    return bool(ended or read_lines(out) or read_losses(out) or _holds_runs(out))


def _holds_runs(out: Path) -> bool:
    """Whether `act` ended runs there."""
    for part in parts_of(out, RUNS_PART):
        with part.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return True
    return False


def part_of_rank(out: Path, what: str = "samples") -> Path:
    """The file of this rank's lines, or of its losses (`what`: "loss"). What a kill left of a last line is cut off."""
    path = out / f".{what}-{world.rank()}.jsonl"
    if path.is_file():
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(written.rfind(b"\n") + 1)
    return path


def read_lines(out: Path) -> Lines:
    """The lines of all ranks' parts. Those that are damaged, or were written by something else, are left out."""
    lines: Lines = {}
    for line in _whole_lines(out, "samples"):
        if {"key", "sample"} <= line.keys():
            lines.setdefault((line["key"], line["sample"]), cast(AnsweredDecision, line))
    return lines


def read_losses(out: Path) -> Losses:
    """What gold costs at decision points, by their keys, as all ranks' parts say it."""
    return {line["key"]: line["loss"] for line in _whole_lines(out, "loss") if {"key", "loss"} <= line.keys()}


def _whole_lines(out: Path, what: str) -> Iterator[dict[str, Any]]:
    """The objects that all ranks wrote; what is damaged is left out."""
    for part in parts_of(out, what):
        for raw in part.read_bytes().split(b"\n")[:-1]:  # what no line end follows was torn, though it may look whole
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
                if isinstance(line, dict):
                    yield line


def complete(out: Path, wanted: Sequence[LineKey], *, with_loss: bool = False) -> list[AnsweredDecision]:
    """The lines of `wanted`, in that order, each with its point's loss where that was measured. Raises EvaluationError
    where one is missing."""
    lines = read_lines(out)
    if with_loss:
        losses = read_losses(out)
        lines = {one: {**line, "loss": losses[one[0]]} for one, line in lines.items() if one[0] in losses}
    missing = [one for one in wanted if one not in lines]
    if missing or len(set(wanted)) < len(wanted):
        raise EvaluationError(
            f"{out} holds {len(lines)} answers, and {len(missing)} of {len(wanted)} that were asked for are missing, "
            f"such as {missing[:NUM_NAMED]}; run the same command again"
        )
    return [lines[one] for one in wanted]


def remove_parts(out: Path) -> None:
    """Remove the files that ranks wrote, and no others."""
    for part in (*parts_of(out, "samples"), *parts_of(out, "loss")):
        part.unlink()


def parts_of(out: Path, what: str) -> list[Path]:
    """The files of lines, or of losses, that ranks wrote."""
    return sorted(path for path in out.iterdir() if re.fullmatch(rf"\.{what}-\d+\.jsonl", path.name))


def _require_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError where a run is not the one that `out` was begun with."""
    wanted, holds = (
        "runs of `act`" if "replay" in run.get("settings", {}) else "an evaluation" for run in (now, before)
    )
    if wanted != holds:
        raise ConfigError(f"{out} holds {holds}, and {wanted} would overwrite them; name another folder, or remove it")
    differences = []
    for name, hashed in NAMES.items():
        if before.get(hashed) != now[hashed]:
            told = f"{name}: {before.get(name)!r} there, {now[name]!r} here"
            differences.append(told + (", of the same name but not the same" if before.get(name) == now[name] else ""))
    settings = {**now["settings"], "limit": now["limit"], "encoding": now["encoding"]}
    settings_before = {**before.get("settings", {}), "limit": before.get("limit"), "encoding": before.get("encoding")}
    for name, value in settings.items():
        if settings_before.get(name) != value:
            differences.append(f"{name}: {settings_before.get(name)} there, {value} here")
    if differences:
        raise ConfigError(
            f"{out} holds {holds} of something else ({'; '.join(differences)}): name another folder, remove it, "
            "or repeat that command to finish it"
        )


def on_rank_0(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank. Its user errors end all of them; the others say nothing."""
    result: T | None = None
    problem: GemmaDistError | None = None
    if world.rank() == 0:
        try:
            result = function()
        except GemmaDistError as error:
            problem = error
    result, failed = world.gather_objects((result, problem is not None))[0]
    if problem is not None:
        raise problem
    if failed:
        raise PeerError("rank 0 says why")
    return result  # type: ignore[return-value]


def hash_data(data: Path) -> str:
    """A hash of the rows' files, which a folder of shards has already."""
    if is_shard_folder(data):
        return open_shards(data).manifest_hash
    return _hash_files(data, [data] if data.is_file() else sorted(filter(Path.is_file, data.rglob("*"))))


def hash_adapter(adapter: Path) -> str:
    """A hash of an adapter's settings and weights."""
    return _hash_files(adapter, sorted(adapter.glob("adapter_*")))


def _hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """A hash of names and bytes."""
    hashed = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashed.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hashed.hexdigest()[:16]
