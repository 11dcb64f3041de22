"""A config of TRL, axolotl, LLaMA-Factory, ms-swift, unsloth or NeMo Automodel, said as a recipe of this package.

    translated = translate(yaml.safe_load(text))
    translated.recipe, translated.shard, translated.left_out

Nothing is dropped without a word: what has no place here is in `left_out`, each with its reason. The tables of names
are in `translate_names.py`; `python -m gemma_dist.translate` writes them into docs/coming_from.md.
"""

import re
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

PAGE = Path("docs/coming_from.md")
BEGIN, END = "<!-- begin: python -m gemma_dist.translate -->", "<!-- end: names by tool -->"
HUB, HUB_NAME = "hf://datasets/", re.compile(r"[\w-][\w.-]*/(?!.*\.(?:jsonl?|parquet|zst|gz|tar)$)[\w.-]+")
NO_PLACE = "no setting here stands for it"
OUR_LINEARS = (
    "left at its default: the linear layers of the language model, by a regular expression (lora.target_modules)"
)
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

    def shard_command(self, model: str = "MODEL") -> str:
        """The call of `gemma-dist shard` that makes what the recipe trains on."""
        words = ["gemma-dist shard", *(self.rows or ["ROWS.jsonl"]), "--model", model]
        for name, value in self.shard.items():
            words += [option(name), str(value)]
        split = f"--split {self.split} --out shards" if self.split else "--out shards/train"
        return " ".join([*words, split])


def tool_of(values: Mapping[str, Any]) -> str:
    """Which tool a config is of, by the keys that give it away.

    Raises:
        ConfigError: none that is known.
    """
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
    said = f"{key}: {value}"
    if value is None or value in ("", [], {}):
        return
    ours = _our_name(key, result.tool)
    if result.tool == AUTOMODEL and key == "optimizer.betas":
        found |= {"train.adam_beta1": value[0], "train.adam_beta2": value[1]}
    elif ours in (ROWS, HELD_OUT):
        (result.rows if ours == ROWS else result.held_out).extend(_paths(value))
    elif ours == SPLIT:
        result.split = float(value) or None
    elif ours is None:
        if value is not False and not key.rpartition(".")[2].startswith("_"):
            result.left_out[said] = _reason(key)
    else:
        taken, why = _value(ours, value)
        if why:
            result.left_out[said] = why
        elif taken is not None:
            found[ours], origin[ours] = taken, said


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
        return chosen or None, ""
    return value, ""


def _paths(value: Any) -> list[str]:
    """What a tool trains on, as `shard` takes it: of a string with commas, a list, or a list of {path: …}."""
    entries = value if isinstance(value, list) else str(value).split(",")
    names = [str(entry.get("path", entry)) if isinstance(entry, Mapping) else str(entry).strip() for entry in entries]
    return [f"{HUB}{name}" if HUB_NAME.fullmatch(name) and not Path(name).exists() else name for name in names]


def _settle(result: Translated, found: dict[str, Any], origin: dict[str, str]) -> None:
    """What follows from several settings together; and all of them into their sections."""
    adapter, four_bits = found.pop(ADAPTER, None), found.pop(FOUR_BITS, None)
    is_adapter = adapter not in (None, False) and str(adapter).lower() not in ("full", "none", "false", "freeze")
    is_four_bits = four_bits is True or str(four_bits) == "4" or str(adapter).lower() == "qlora"
    result.recipe["tuning"] = ("qlora" if is_four_bits else "lora") if is_adapter else "full"
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
