"""Evaluate a model that a server holds: many requests at a time, and lines, log, report and resume as of a model here.

What a point is known by (`key_of`) hangs on the server's name of the model, what is asked and the settings, and not on
the server's address: a server that was started again elsewhere goes on with a run. What lies behind the name, only the
server knows. This process is enough, however many GPUs the server has.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gemma_dist import world
from gemma_dist.config import EvaluateConfig, Section, option
from gemma_dist.config_act import ActConfig
from gemma_dist.config_server import ServerConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.read import open_block
from gemma_dist.data.strict import as_list, get
from gemma_dist.errors import ConfigError, PeerError
from gemma_dist.evaluate import chat
from gemma_dist.evaluate.client import Client, Refusal, Unanswered, parse_address, read_key
from gemma_dist.evaluate.decision import AnsweredDecision
from gemma_dist.evaluate.extra_body import read_extra_body
from gemma_dist.evaluate.faults import Faults, ends_all, remedy_of
from gemma_dist.evaluate.line import asked, score_lines
from gemma_dist.evaluate.log import (
    MAY_DIFFER,
    NUM_NAMED,
    Lines,
    complete,
    hash_data,
    key_of,
    opened,
    part_of_rank,
    remove_parts,
)
from gemma_dist.evaluate.message import MESSAGE, say_reading
from gemma_dist.evaluate.parallel import in_parallel
from gemma_dist.evaluate.points import Point, find_points
from gemma_dist.evaluate.report import Report, summary
from gemma_dist.evaluate.runs import REPORT, command, made_by, where_to_look, write_results
from gemma_dist.evaluate.shown import join_shown, keep_shown
from gemma_dist.gemma_format import STOP_TOKENS
from gemma_dist.logs import JsonlWriter, log, progress

OF_A_MODEL_HERE = ("per_device_eval_batch_size", "max_batch_tokens", "ple")  # settings that no server takes


@dataclass
class Asking:
    """How a server is asked in a run of `evaluate`, or of `act`."""

    client: Client
    model: str
    settings: EvaluateConfig | ActConfig
    server: ServerConfig
    encoder: Encoder | None
    extra: dict[str, Any]
    served: dict[str, Any]  # what the server says of the model
    tokens_read: int = 0
    tokens_written: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """What a report says of the server."""
        told = self.server.model_dump(mode="json", exclude={"server"})
        return {"url": str(self.client.address), **told, "served": self.served}

    def ask(self, job: tuple[Point, str, int]) -> chat.Served:
        """The answer to a sample of a point.

        Raises:
            Refusal, Unanswered, Misanswer
        """
        point, _, sample = job
        fields: dict[str, Any] = {"model": self.model} | chat.sampling_fields(self.settings, point.place, sample)
        decode = None if self.encoder is None else self.encoder.tokenizer.decode
        if self.server.endpoint == "chat":
            told = chat.chat_fields(point.history, point.images, point.trajectory.tools, point.thinking)
            ids = {} if decode is None else {"return_token_ids": True}
            try:
                answer = self.client.ask("/chat/completions", chat.with_extra(told | fields | ids, self.extra))
            except Unanswered as error:
                if error.status != 500 or self.server.server_errors == "fail":
                    raise
                return chat.failed_answer(error.words)
            return self._read(chat.read_chat, answer, decode)
        assert self.encoder is not None
        assert point.prompt is not None
        stops = self.encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
        told = {"prompt": point.prompt.input_ids, "skip_special_tokens": False, "stop_token_ids": stops}
        answer = self.client.ask("/completions", chat.with_extra(told | fields, self.extra))
        return self._read(chat.read_completion, answer)

    def _read(self, read: Callable[..., chat.Served], *answer: Any) -> chat.Served:
        """What `read` finds in an answer. Raises Misanswer, without the key."""
        try:
            return read(*answer)
        except chat.Misanswer as error:
            raise chat.Misanswer(error.words, self.client.hidden_in(error.value)) from None


def begin_asking(model: str | None, settings: EvaluateConfig | ActConfig, server: ServerConfig) -> Asking:
    """Find the model that a server calls `model` (None: its only one).

    Raises:
        ConfigError: settings that do not go together, or the server is not there, does not let us in, or serves another
            model.
    """
    extra = require_fit(settings, server)
    address = parse_address(server.server or "")
    client = Client(address, read_key(), timeout_s=server.request_timeout_s, max_retries=server.max_retries)
    name, served = find_model(client, model)
    encoder = None if server.processor is None else load_encoder(server.processor, settings)
    return Asking(client, name, settings, server, encoder, extra, served)


def evaluate_server(
    model: str | None, data: Path, out: Path, limit: int | None, settings: EvaluateConfig, server: ServerConfig
) -> Report:
    """Evaluate the model that a server calls `model` (None: its only one), as `run.evaluate` does with one here.

    Raises:
        ConfigError: as `begin_asking`; or `out` holds a report, or another run.
        DataError: the data cannot be used.
        EvaluationError: some points could not be answered, or the server went away; the other answers are kept.
    """
    if (out / REPORT).exists():
        raise ConfigError(f"{out / REPORT} exists already; name another folder or remove it")
    asking = begin_asking(model, settings, server)
    with opened(out, lambda: describe_served(asking, data, limit)) as (run, lines):
        points, tool_sets = find_points(data, limit, settings, asking.encoder)
        if server.endpoint == "completions":
            _require_no_images(points)
        keyed = [(point, _key_of(run, point)) for point in points]
        keep_shown(out, {point.number: point.trajectory for point in points})
        times = _write_answers(asking, out, keyed, lines, settings.num_samples)
        keys = [(key, sample) for _, key in keyed for sample in range(settings.num_samples)]
        settings_now = settings.model_dump(mode="json") | {"loss": False}  # which no server tells
        header = {**run, **made_by(asking.encoder), "settings": settings_now, "server": asking.about}
        header["times"] = {"command": command(), **times}
        join_shown(out)
        report = write_results(
            out, header, score_lines(complete(out, keys), tool_sets, settings.answer_tolerance), tool_sets
        )
        remove_parts(out)
    for sentence in summary(report):
        log.info(sentence)
    if reading := report.get("server_reading"):
        for sentence in say_reading(reading):
            log.warning(sentence)
    for sentence in where_to_look(report, out):
        log.info(sentence)
    return report


def find_model(client: Client, asked_for: str | None) -> tuple[str, dict[str, Any]]:
    """The server's name of the model, and what it says of it.

    Raises:
        ConfigError: the server is not there, does not let us in, or serves something else.
    """
    try:
        listing = as_list(client.look("/models").get("data"))
    except Unanswered as error:
        raise ConfigError(
            f"--server {client.address} does not answer ({error}): start the server, or name the address where it "
            "listens"
        ) from None
    except Refusal as error:
        listing = []
        if error.status != 404 and not 500 <= error.status < 600:
            raise ConfigError(f"--server {client.address}: {error}{remedy_of(error.status)}") from None
        if error.status == 404 and not client.address.path.endswith("/v1"):
            raise ConfigError(
                f"--server {client.address} has no /models ({error}); such an address mostly ends in /v1"
            ) from None
    models = {name: entry for entry in listing if isinstance(name := get(entry, "id"), str)}
    names = client.hidden(_some(models))
    if asked_for is None and len(models) != 1:
        raise ConfigError(f"--server {client.address} serves {names or 'it does not say what'}; name one by --model")
    name = next(iter(models)) if asked_for is None else asked_for
    if models and name not in models and not _lists_what_it_could_serve(client):
        raise ConfigError(f"--model {name}: --server {client.address} serves {names}; name one of these")
    told = {key: models.get(name, {}).get(key) for key in ("owned_by", "root", "parent", "max_model_len")}
    return name, {key: client.hidden_in(value) for key, value in told.items() if isinstance(value, (str, int))}


def _lists_what_it_could_serve(client: Client) -> bool:
    """Whether this is `transformers serve`: it lists what lies in the Hub's cache, and refuses itself what it does not
    serve."""
    root = Client(parse_address(str(client.address).removesuffix("/v1")), None, timeout_s=10, max_retries=0)
    try:
        return "/load_model" in root.look("/openapi.json").get("paths", {})
    except (Refusal, Unanswered):
        return False


def _some(names: Iterable[str]) -> str:
    """Some of many names."""
    names = list(names)
    return ", ".join(names[:NUM_NAMED]) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")


def require_fit(settings: EvaluateConfig | ActConfig, server: ServerConfig) -> dict[str, Any]:
    """What `extra_body` says, where the settings go together; else ConfigError."""
    if world.rank() > 0:
        raise PeerError("rank 0 says that it needs no others")
    if world.world_size() > 1:
        raise ConfigError("--server needs one process, not several under a launcher: raise --concurrency instead")
    given = [name for name in OF_A_MODEL_HERE if getattr(settings, name) != type(settings).model_fields[name].default]
    if given:
        raise ConfigError(
            f"{option(given[0])} is for a model that is loaded here, and --server asks one elsewhere: leave it out "
            "(--concurrency says how many requests are under way)"
        )
    if server.endpoint == "completions" and server.processor is None:
        raise ConfigError("--endpoint completions asks with prompts that are rendered here: name the --processor")
    if server.endpoint == "completions" and server.server_errors == "malformed":
        raise ConfigError("--server-errors malformed is for chat, where the server reads calls: leave it out")
    if server.processor is None and settings.unroll != "none":
        raise ConfigError("--unroll reasoning looks at the template's prompts: name the --processor")
    if settings.chat_template is not None and server.endpoint == "chat":
        raise ConfigError(
            "--chat-template: a server of chat renders with its own; start the server with that template, or use "
            "--endpoint completions"
        )
    return read_extra_body(server.extra_body)


def require_no_server_settings(server: ServerConfig) -> None:
    """Raises ConfigError where settings of a server are given without one."""
    section: type[Section] = ServerConfig
    for name, field_info in section.model_fields.items():
        if getattr(server, name) != field_info.default:
            raise ConfigError(f"{option(name)} is for a server: name it by --server, or leave {option(name)} out")


def _require_no_images(points: Iterable[Point]) -> None:
    for point in points:
        if point.images:
            raise ConfigError(
                f"{point.trajectory.id} shows images, and --endpoint completions takes text alone; use --endpoint chat"
            )


def describe_served(asking: Asking, data: Path, limit: int | None) -> dict[str, Any]:
    """What the evaluation is, as run.json holds it: as `log.describe_run` says it of a model here."""
    settings = asking.settings.model_dump(mode="json", exclude=set(MAY_DIFFER))
    return {
        "model": asking.model,
        "model_hash": f"served as {asking.model}",
        "adapter": None,
        "adapter_hash": None,
        "data": str(data),
        "data_hash": hash_data(data),
        "limit": limit,
        "encoding": "the server's own" if asking.encoder is None else asking.encoder.fingerprint,
        "settings": {
            **settings,
            "endpoint": asking.server.endpoint,
            "server_errors": asking.server.server_errors,
            "extra_body": asking.extra,
        },
    }


def _key_of(run: Mapping[str, Any], point: Point) -> str:
    """`log.key_of`, here to say what is asked: messages and tools, which the server renders."""
    return key_of(run, point.place, [point.history, point.trajectory.tools, point.thinking], point.images)


def _write_answers(
    asking: Asking, out: Path, keyed: list[tuple[Point, str]], lines: Lines, num_samples: int
) -> dict[str, Any]:
    """Ask what `lines` do not answer yet, in the order of the data (servers keep the prompt that they read last), and
    write each answer as it comes; what it took.

    Raises:
        EvaluationError: points stayed without an answer, or the server went away.
    """
    samples = range(num_samples)
    jobs = [(point, key, sample) for point, key in keyed for sample in samples if (key, sample) not in lines]
    start = time.perf_counter()
    writer = JsonlWriter(part_of_rank(out), append=True)
    faults = Faults(asking.client, out, asking.server.concurrency, answered=bool(lines))
    results = in_parallel(jobs, asking.ask, asking.server.concurrency, ends_all, faults.stopped)
    try:
        with closing(progress(results, total=len(jobs), desc="evaluating", unit="answer")) as shown:
            for (point, key, sample), answer in shown:
                if isinstance(answer, chat.Served):
                    writer.write(_line(asking, point, key, sample, answer))
                    faults.note_answer()
                else:
                    faults.note(point, answer)
    finally:
        asking.client.close()
        writer.close()
    faults.require_none()
    took = {"seconds": round(time.perf_counter() - start, 3), "answers": len(jobs)}
    took |= {"tokens_read": asking.tokens_read, "tokens_written": asking.tokens_written}
    took |= {"requests_sent_again": asking.client.num_retries}
    return {"world_size": 1, "ranks": [took]}


def _line(asking: Asking, point: Point, key: str, sample: int, answer: chat.Served) -> AnsweredDecision:
    """An answer as its line."""
    asking.tokens_read += answer.prompt_tokens
    asking.tokens_written += answer.output_tokens
    is_text = asking.server.endpoint == "completions"
    prompt = point.prompt
    line = {
        **asked(point.trajectory, point.number, point.gold, point.index + 1),
        "sample": sample,
        "key": key,
        "num_images": len(point.images),
        "prompt_tokens": len(prompt.input_ids) if is_text and prompt else answer.prompt_tokens,
        "opening": open_block(prompt.text) if prompt else "",
        "output": answer.output,
        "output_ids": [],
        "output_tokens": answer.output_tokens,
        "stopped": answer.stopped,
    }
    if not is_text:
        line["form"] = MESSAGE
    if answer.raw is not None:
        line["raw"] = answer.raw
    if not is_text and prompt and answer.prompt_tokens:
        line["own_prompt_tokens"] = len(prompt.input_ids)
    return cast(AnsweredDecision, line)
