"""The model card, README.md beside every adapter and model that this package writes: what it is, and how it came about.

It says what the folder's own record and settings say, so the same folder has the same card. The format of its head is
the hub's (https://huggingface.co/docs/hub/model-cards). PEFT writes a template of a card into what it saves, with
"[More Information Needed]" in every section; that one is replaced.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gemma_dist.files import writing
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.folder import ADAPTER_CONFIG
from gemma_dist.visible import visible

CARD = "README.md"
# By this line a card is known to be as it was written: the hash is that of all other lines.
OURS = re.compile(r"^<!-- gemma_dist wrote this \(([0-9a-f]{16})\).* -->\n", re.MULTILINE)
PEFTS = "[More Information Needed]"
PEFTS_END = re.compile(r"### Framework versions|- PEFT .*")  # what PEFT adds to the hub's template
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")

# What is shown first of an evaluation, where it has it.
METRICS = {
    "overall": "answers right, calls and texts",
    "call_exact": "calls exact",
    "tool_f1": "right tools (F1)",
    "arg_f1": "right arguments (F1)",
    "abstain_acc": "no call where none is due",
    "schema_valid": "calls that fit their tool's schema",
    "answer_exact": "texts exact",
    "trajectory_exact": "trajectories right from end to end",
}


def public_name(model: str) -> str:
    """A model as others can name it: the hub's name, also of a folder in its cache, or the name of a folder alone."""
    if found := CACHED.search(model):
        return f"{found[1]}/{found[2]}"
    if HUB_NAME.fullmatch(model) and not _is_folder(model):
        return model
    return Path(model).absolute().name


def license_of(base: str) -> dict[str, str]:
    """What the card of a base in a folder says of its license; nothing where it has none at hand."""
    try:
        text = (Path(base) / CARD).read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(head, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: head[key] for key in keys if isinstance(head.get(key), str)}


def is_ours(path: Path) -> bool:
    """Whether a card may be written anew: there is none, or one that nobody wrote or changed by hand."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    line = OURS.search(text)
    is_unchanged = line is not None and line[1] == _hash(text.replace(line[0], "", 1))
    return is_unchanged or (PEFTS in text and _is_pefts(text))


def _is_pefts(text: str) -> bool:
    """Whether a card is the template that PEFT saves, with no line of a user's in it."""
    from huggingface_hub import ModelCard, ModelCardData

    known = {"", *ModelCard.from_template(ModelCardData()).text.splitlines()}
    body = text.partition("\n---\n")[2].splitlines()
    return bool(body) and all(line in known or PEFTS_END.fullmatch(line) for line in body)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(folder: Path, record: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> bool:
    """Write the card of a folder, unless somebody wrote one by hand. Returns whether it was written.

    Args:
        record: of the folder, as gemma_dist.json has it.
        report: of an evaluation, as report.json has it.

    Raises:
        CheckpointError: the adapter's settings are broken.
    """
    if not is_ours(folder / CARD):
        return False
    adapter = None
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        adapter = read_adapter_config(folder)
    with writing(folder / CARD) as temporary:
        temporary.write_text(render_card(record, adapter, report), encoding="utf-8")
    return True


def publish_card(checkpoint: Path, result: Path) -> None:
    """Copy the card of a checkpoint to the result of its run, where nobody wrote one by hand."""
    try:
        text = (checkpoint / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):  # an earlier version wrote none
        return
    if OURS.search(text) and is_ours(result / CARD):
        with writing(result / CARD) as temporary:
            temporary.write_text(text, encoding="utf-8")


def render_card(record: Mapping[str, Any], adapter: Mapping[str, Any] | None, report: Mapping[str, Any] | None) -> str:
    """The card's text.

    Args:
        adapter: adapter_config.json, where the folder holds an adapter and no model.
    """
    base = str(record.get("base_model") or (adapter or {}).get("base_model_name_or_path") or "")
    name, license_words = _line(public_name(base)) if base else "a Gemma 4", license_of(base)
    trained = _object(record.get("training")) or record
    adapters = _object(record.get("adapters"))
    tuning = "adapter" if adapter else ("merge" if adapters else "finetune")
    head: dict[str, Any] = {}
    if HUB_NAME.fullmatch(name):
        head |= {"base_model": name, "base_model_relation": "adapter" if adapter else "finetune"}
    head |= license_words
    head |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "image-text-to-text"}
    head["tags"] = sorted({"gemma4", "tool-calling", "gemma_dist", *({"lora"} if tuning != "finetune" else ())})
    added = "a LoRA adapter that was" if len(adapters) == 1 else f"{len(adapters)} LoRA adapters that were"
    held, where = (" in 4 bits", "beside it") if record.get("saved_in_4bit") else ("", "added to its weights")
    kinds = {
        "adapter": f"A LoRA adapter of {name}, trained on tool calling.",
        "merge": f"{name}{held}, with {added} trained on tool calling {where}.",
        "finetune": f"{name}, fine-tuned on tool calling.",
    }
    license_line = "as its base" + (f": {license_words['license']}" if "license" in license_words else "")
    if texts := sorted(path.name for path in Path(base).glob("LICENSE*")) if base and _is_folder(base) else []:
        license_line += f" ({', '.join(texts)} in its folder)"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name.rpartition('/')[2]} for tool calling",
        "",
        kinds[tuning],
        "",
        "## How it came about",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_line(what)} | {_line(value)} |" for what, value in _rows(record, trained, adapter)),
        f"| license | {_line(license_line)} |",
        *_evaluation(report),
        "",
        "## Use",
        "",
        *_use(tuning),
    ]
    text = "\n".join(lines) + "\n"
    words = "`gemma-dist card` writes it anew, with an evaluation, as long as nobody changes it by hand."
    head_end = text.index("\n---\n") + len("\n---\n")
    return f"{text[:head_end]}<!-- gemma_dist wrote this ({_hash(text)}). {words} -->\n{text[head_end:]}"


def _is_folder(base: str) -> bool:
    try:
        return Path(base).is_dir()
    except OSError:  # longer than any path
        return False


def _object(value: object) -> Mapping[str, Any]:
    """An object of a record, which may come from anyone; an empty one in the place of anything else."""
    return value if isinstance(value, Mapping) else {}


def _line(value: object) -> str:
    """A value as text that breaks no line or table, and that UTF-8 can encode."""
    return visible(" ".join(str(value).split())).replace("|", "\\|")


def _rows(
    record: Mapping[str, Any], trained: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> Iterator[tuple[str, object]]:
    """What the table says: only what is known."""
    lora = _object(trained.get("lora")) or {
        key: (adapter or {}).get(key) for key in ("r", "lora_alpha", "lora_dropout")
    }
    if any(lora.get(key) is not None for key in ("r", "lora_alpha")):
        options = [key for key in ("use_rslora", "use_dora") if lora.get(key)]
        yield "LoRA", f"r {lora.get('r')}, alpha {lora.get('lora_alpha')}" + "".join(f", {key}" for key in options)
    elif trained.get("tuning") == "full":
        yield "tuning", "all weights"
    if len(adapters := _object(record.get("adapters"))) > 1:
        yield "adapters", ", ".join(f"{weight} x {Path(folder).name}" for folder, weight in adapters.items())
    if extracted := _object(record.get("extracted")):
        lacks = _number(_object(extracted.get("relative_error")).get("total"), ".2%")
        yield "extracted from", f"{public_name(str(extracted.get('tuned')))}, of whose change it lacks {lacks}"
    quantization = _object(trained.get("quantization") or trained.get("four_bit") or record.get("quantization"))
    if quantization.get("bnb_4bit_quant_type"):
        held = f"4 bits ({quantization['bnb_4bit_quant_type']})"
        yield "base while training", held
        if "base_weights" in record:
            yield "added to", "those, made full again" if record["base_weights"] == "as_trained" else "the original"
    if trained.get("manifest"):
        yield "data", f"{_number(trained.get('num_samples'), ',')} samples, manifest `{trained['manifest']}`"
    yield from _object(trained.get("recipe")).items()
    if trained.get("base_weights_hash"):
        yield "base weights", f"`{trained['base_weights_hash']}`"
    if "kl" in (verification := _object(record.get("verification"))):
        yield "verified", f"logits of base and adapter: KL {_number(verification['kl'], '.2g')}"
    yield from _object(record.get("versions")).items()


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "?"


def _evaluation(report: Mapping[str, Any] | None) -> list[str]:
    """The metrics of an evaluation, with how many decision points they are of."""
    if report is None:
        return []
    metrics = _object(report.get("metrics"))
    lines = ["", "## Evaluation", "", "| | | of |", "|---|---|---|"]
    for name, words in METRICS.items():
        metric = _object(metrics.get(name))
        if metric.get("value") is not None:
            value, of = _number(metric["value"], ".1%"), _number(metric.get("denominator"), ",")
            lines.append(f"| {words} (`{name}`) | {value} | {of} |")
    points = f"{_number(report.get('num_decision_points'), ',')} decision points"
    data = f"{_number(report.get('num_trajectories'), ',')} held-out trajectories"
    line = f"By `gemma-dist evaluate`, on {points} of {data} (data `{_line(report.get('data_hash'))}`)."
    return [*lines, "", line]


def _use(tuning: str) -> list[str]:
    if tuning == "adapter":
        return ["    gemma-dist merge --base BASE --adapter . --out merged"]
    return [
        "    gemma-dist check-model .",
        "    gemma-dist serve .",
        "",
        "vLLM and SGLang read its calls by their parser `gemma4`.",
    ]
