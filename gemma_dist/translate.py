"""A config of TRL, axolotl, LLaMA-Factory, ms-swift, unsloth or NeMo Automodel, said as a recipe of this package.

    translated = translate(yaml.safe_load(text))
    translated.recipe, translated.shard, translated.left_out

Nothing is dropped without a word: what has no place here is in `left_out`, each with its reason. The tables of names
are in `translate_names.py`; `python -m gemma_dist.translate` writes them into docs/coming_from.md.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gemma_dist.aliases import NOT_SETTINGS, RENAMED, RENAMED_OPTIONS
from gemma_dist.config import RunConfig, ShardConfig, option
from gemma_dist.errors import ConfigError
from gemma_dist.recipe import KEYS, read_recipe
from gemma_dist.translate_names import (
    ADAPTER,
    AUTOMODEL,
    CHECKPOINTING,
    DEFAULTS,
    DTYPES,
    FOUR_BITS,
    HELD_OUT,
    NAMES,
    OPTIMIZERS,
    REASONS,
    ROWS,
    SHARD,
    SPLIT,
    TELLTALES,
    TOOLS,
)
from gemma_dist.visible import masked

PAGE = Path("docs/coming_from.md")
BEGIN, END = "<!-- begin: python -m gemma_dist.translate -->", "<!-- end: names by tool -->"
HUB, HUB_NAME = "hf://datasets/", re.compile(r"[\w-][\w.-]*/(?!.*\.(?:jsonl?|parquet|zst|gz|tar)$)[\w.-]+")
SECRET = re.compile(r"(?i)(?:^|[._])(?:token|api_?key|key|secret|password|passwd)$")
NO_PLACE = "no setting here stands for it"
OUR_LINEARS = (
    "left at its default: the linear layers of the language model, by a regular expression (lora.target_modules)"
)
WHOLE_ROWS = "`gemma-dist shard` reads all rows of what it is given: name their files"
NO_SHARE = "no share of the rows: `gemma-dist shard --split` takes one between 0 and 1, such as 0.05"
OUR_ATTENTION = "left at sdpa: FlashAttention-2 ends at head dimension 256, and Gemma 4 has 512"


@dataclass
class Translated:
    """A config of another tool in our words."""

    tool: str
    recipe: dict[str, Any] = field(default_factory=dict)  # as a YAML recipe has it: sections of settings
    shard: dict[str, Any] = field(default_factory=dict)  # settings of `gemma-dist shard`: max_length …
    rows: list[str] = field(default_factory=list)  # what it trains on, as it names it: files, or datasets of the hub
    held_out: list[str] = field(default_factory=list)
    split: float | None = None  # share of rows that it puts aside
    left_out: dict[str, str] = field(default_factory=dict)  # `key: value` of theirs -> why it is not here
    problems: list[str] = field(default_factory=list)  # what contradicts itself, or is missing, in the recipe

    def to_yaml(self) -> str:
        """The recipe as a file, with what was left out as comments at its end."""
        text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        if self.left_out:
            text += "\n# Not carried over:\n"
            text += "".join(f"#   {' '.join(said.split())}: {why}\n" for said, why in self.left_out.items())
        return text

    def shard_commands(self, model: str = "MODEL") -> list[str]:
        """The calls of `gemma-dist shard` that make what the recipe trains on, and what it is evaluated on."""
        into = ["--split", str(self.split), "--out", "shards"] if self.split else ["--out", "shards/train"]
        calls = [(self.rows or ["ROWS.jsonl"], into)]
        if self.held_out:
            calls.append((self.held_out, ["--out", "shards/held_out"]))
        same = ["--model", model, *(word for name, value in self.shard.items() for word in (option(name), str(value)))]
        return [shlex.join(["gemma-dist", "shard", *rows, *same, *out]) for rows, out in calls]


def tool_of(values: Mapping[str, Any]) -> str:
    """Which tool a config is of, by the keys that give it away.

    Raises:
        ConfigError: none that is known.
    """
    if "tuning" in values:
        raise ConfigError("it has `tuning`, as recipes of this package have: `gemma-dist check` takes it as it is")
    for tool, keys in TELLTALES.items():
        if any(key in values for key in keys):
            return tool
    raise ConfigError(f"no config of {', '.join(TOOLS)}: none of their keys is among {', '.join(map(str, values))}")


def translate(values: Mapping[str, Any], tool: str | None = None) -> Translated:
    """A config, as YAML gives it, in our words.

    Args:
        tool: one of TOOLS; None: as `tool_of` finds.

    Raises:
        ConfigError: it is none of a tool that is known.
    """
    if tool is not None and tool not in TOOLS:
        raise ConfigError(f"{tool!r} is none of {', '.join(TOOLS)}")
    result = Translated(tool or tool_of(values))
    found: dict[str, Any] = dict(DEFAULTS.get(result.tool, {}))  # by our keys
    origin: dict[str, str] = {}  # our key -> `key: value` of theirs
    for key, value in _flat(values, NAMES[result.tool]):
        _take(key, value, result, found, origin)
    _settle(result, found, origin)
    _check(result, origin)
    return result


def translate_file(path: str | Path, tool: str | None = None) -> Translated:
    """`translate` of a YAML file.

    Raises:
        ConfigError: it cannot be read, is no mapping, or of no tool that is known.
    """
    return translate(read_recipe(Path(path)), tool)


def _flat(values: Mapping[str, Any], names: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its dotted key; a mapping that has a meaning as a whole stays one."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted not in names and str(key) not in NOT_SETTINGS:
            yield from _flat(value, names, f"{dotted}.")
        else:
            yield dotted, value


def _take(key: str, value: Any, result: Translated, found: dict[str, Any], origin: dict[str, str]) -> None:
    """Put one setting of theirs to where it belongs."""
    if value is None or value in ("", [], {}):
        return
    said = f"{key}: {'***' if _is_secret(key, value) else masked(str(value))}"
    ours = _our_name(key, result.tool)
    if result.tool == AUTOMODEL and key == "optimizer.betas" and isinstance(value, list) and len(value) == 2:
        found |= {"train.adam_beta1": value[0], "train.adam_beta2": value[1]}
    elif ours in (ROWS, HELD_OUT):
        (result.rows if ours == ROWS else result.held_out).extend(_paths(value))
        result.left_out.update({f"{key}: {name}: {what}": WHOLE_ROWS for name, what in _parts(value)})
    elif ours == SPLIT:
        share = value if isinstance(value, (int, float)) else 0
        if 0 < share < 1:
            result.split, origin[SPLIT] = share, said
        elif value is not False and value != 0:
            result.left_out[said] = NO_SHARE
    elif ours is None:
        if value is not False and not key.rpartition(".")[2].startswith("_"):
            result.left_out[said] = _reason(key)
    else:
        taken, why = _value(ours, value)
        if why:
            result.left_out[said] = why
        elif taken is not None:
            if ours in origin and found[ours] != taken:
                result.left_out[origin[ours]] = f"{said} is said of the same, and taken"
            found[ours], origin[ours] = taken, said


def _is_secret(key: str, value: Any) -> bool:
    """Whether a setting holds a token or a password, which is not to be written down again."""
    return isinstance(value, str) and bool(SECRET.search(key))


def _reason(key: str) -> str:
    """Why a setting of theirs has no place here."""
    bare, section = key.rpartition(".")[2], key.partition(".")[0]
    return REASONS.get(bare) or REASONS.get(section) or NOT_SETTINGS.get(bare) or NOT_SETTINGS.get(section) or NO_PLACE


def _our_name(key: str, tool: str) -> str | None:
    """Our key for one of theirs; None: there is none."""
    if key in NAMES[tool]:
        return NAMES[tool][key]
    bare = key.rpartition(".")[2]
    if _reason(key) != NO_PLACE or bare.startswith("_"):
        return None
    same = [ours for ours in KEYS if ours.partition(".")[2] == bare and not ours.startswith("data.")]
    if same:
        return same[0]
    if bare in RENAMED_OPTIONS:
        return SHARD + RENAMED_OPTIONS[bare]
    return RENAMED.get(bare) if not RENAMED.get(bare, "").startswith(("data.", "tuning")) else None


def _value(ours: str, value: Any) -> tuple[Any, str]:
    """A value as we write it, or why it is left out."""
    word = str(value).lower().removeprefix("torch.")
    if ours == "model.dtype":
        return DTYPES.get(word, word), "" if word != "auto" else "bfloat16 is the default"
    if ours == "model.attn_implementation" and word not in ("sdpa", "eager", "flex_attention"):
        return None, OUR_ATTENTION
    if ours == "lora.target_modules" and not (isinstance(value, str) and value.startswith(".*language_model")):
        return None, OUR_LINEARS if value else ""
    if ours in ("train.max_steps", "train.save_steps") and value == 0:
        return None, ""  # they mean: none is given
    if ours == "train.optim":
        return OPTIMIZERS.get(word, word), ""
    if ours == "train.gradient_checkpointing":
        return CHECKPOINTING.get(word, value), ""
    if ours == "train.report_to":
        chosen = value[0] if isinstance(value, list) else value
        return chosen or None, ""  # none where a switch is off
    return value, ""


def _paths(value: Any) -> list[str]:
    """What a tool trains on, as `shard` takes it: of a string with commas, a list, or a list of {path: …}."""
    entries = value if isinstance(value, list) else [value] if isinstance(value, Mapping) else str(value).split(",")
    names = [str(entry.get("path", entry)) if isinstance(entry, Mapping) else str(entry).strip() for entry in entries]
    return [f"{HUB}{name}" if HUB_NAME.fullmatch(name) and not Path(name).exists() else name for name in names]


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What entries such as {path: …, split: …} ask of their rows that takes some of them alone."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, Mapping):
            yield from ((name, entry[name]) for name in ("name", "split", "shards") if entry.get(name) is not None)


def _settle(result: Translated, found: dict[str, Any], origin: dict[str, str]) -> None:
    """What follows from several settings together; and all of them into their sections."""
    result.recipe["tuning"] = _tuning(found.pop(ADAPTER, None), found.pop(FOUR_BITS, None), result, origin)
    is_adapter = result.recipe["tuning"] != "full"
    if result.held_out and result.split:
        result.split, result.left_out[origin[SPLIT]] = None, "held-out rows are named, and evaluated on"
    if found.get("train.report_to") is True:  # of a switch, whose name says which
        found["train.report_to"] = "wandb" if "wandb" in origin["train.report_to"] else "tensorboard"
    if "train.packing_length" in found:
        found["train.packing"] = True
    if found.get("train.packing") and SHARD + "max_length" in found:
        found.setdefault("train.packing_length", found[SHARD + "max_length"])
    found.setdefault("train.output_dir", "runs/translated")
    evaluates = bool(result.held_out or result.split)
    if evaluates and found.get("train.eval_steps"):
        found.setdefault("train.eval_strategy", "steps")
    wrong_for = {"lora.": not is_adapter, "quantization.": result.recipe["tuning"] != "qlora"}
    result.recipe |= {"model": {}, "data": {"train": "shards/train"}, "train": {}}
    if evaluates:
        result.recipe["data"]["eval"] = "shards/held_out"
    for ours, value in found.items():
        section, _, name = ours.partition(".")
        if wrong_for.get(f"{section}.") or value is None:
            continue
        if not evaluates and (name.startswith("eval_") or name == "per_device_eval_batch_size"):
            if value not in ("no", False):
                result.left_out[origin[ours]] = "no held-out rows are named, of which it speaks (data.eval)"
        elif ours.startswith(SHARD):
            result.shard[name] = value
        else:
            result.recipe.setdefault(section, {})[name] = value


def _tuning(adapter: Any, four_bits: Any, result: Translated, origin: Mapping[str, str]) -> str:
    """What is trained, by their kind of adapter and their bits of a weight; what differs is left out with a word."""
    kind = "none" if adapter is None else str(adapter).lower()
    is_adapter = kind not in ("full", "none", "false", "freeze")
    if kind == "freeze":
        result.left_out[origin[ADAPTER]] = "tuning: full trains every weight, not a few layers"
    elif is_adapter and kind not in ("lora", "qlora", "true") and result.tool != AUTOMODEL:
        result.left_out[origin[ADAPTER]] = "adapters here are LoRA, DoRA and rsLoRA: tuning: lora is taken"
    is_four_bits = four_bits is True or str(four_bits).lower() in ("4", "true", "bnb-4bit") or kind == "qlora"
    if FOUR_BITS in origin and four_bits not in (False, 0) and not (is_adapter and is_four_bits):
        why = "weights in 4 bits are for adapters" if is_four_bits else "a base is held in 4 bits (tuning: qlora) or 16"
        result.left_out[origin[FOUR_BITS]] = why
    return ("qlora" if is_four_bits else "lora") if is_adapter else "full"


def _check(result: Translated, origin: Mapping[str, str]) -> None:
    """Move values that a recipe refuses to what is left out; keep what contradicts itself."""
    for name in list(result.shard):
        if name not in ShardConfig.model_fields:
            result.left_out[origin.get(SHARD + name, name)] = NO_PLACE
            del result.shard[name]
    for _ in range(len(KEYS)):
        try:
            RunConfig.model_validate(result.recipe)
            return
        except ValidationError as error:
            wrong = [item for item in error.errors() if item["type"] != "missing" and len(item["loc"]) > 1]
            if not wrong:
                missing = [f"{'.'.join(map(str, item['loc']))}: missing" for item in error.errors() if item["loc"]]
                said = [str(item["ctx"]["error"]) for item in error.errors() if not item["loc"]]
                result.problems = missing + [line for text in said for line in text.splitlines()]
                return
            for item in wrong:
                section, name = map(str, item["loc"][:2])
                if name in result.recipe.get(section, {}):
                    value = result.recipe[section].pop(name)
                    result.left_out[origin.get(f"{section}.{name}", f"{name}: {value}")] = item["msg"]


# ---- the page --------------------------------------------------------------------------------------------------------


def name_tables() -> str:
    """What each tool calls what, as Markdown."""
    words = {ROWS: "the INPUT of `gemma-dist shard`", HELD_OUT: "rows sharded into a folder of their own: `data.eval`"}
    words |= {SPLIT: "`gemma-dist shard --split`", ADAPTER: "`tuning`"}
    words |= {FOUR_BITS: "`tuning: qlora`"}
    parts = []
    for tool in TOOLS:
        rows = [f"### {tool}", "", f"| {tool} | here |", "|---|---|"]
        for theirs, ours in NAMES[tool].items():
            if ours in KEYS and theirs == ours.partition(".")[2]:
                continue
            here = words.get(ours) or f"`{ours}`"
            if ours.startswith(SHARD):
                here = f"`gemma-dist shard {option(ours.removeprefix(SHARD))}`"
            rows.append(f"| `{theirs}` | {here} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def with_name_tables(page: str) -> str:
    """The Markdown `page` with the tables as they are now between BEGIN and END."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{name_tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_name_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
