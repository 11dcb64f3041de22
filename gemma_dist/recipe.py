"""Read a recipe: a YAML file and `key=value` overrides become a checked RunConfig, or a list of all their problems.

    config = load_config("launch/cpu_lora.yaml", ["learning_rate=1e-4", "lora.r=8"])

config.py says what a setting may be. Here an unknown key is answered with the nearest one that exists, or with what
aliases.py knows about it.
"""

import difflib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError

from gemma_dist.aliases import NOT_SETTINGS, RENAMED, RENAMED_OPTIONS
from gemma_dist.config import (
    LoraConfig,
    ModelConfig,
    QuantizationConfig,
    RunConfig,
    Section,
    ShardConfig,
    TrainConfig,
    TrainDataConfig,
    option,
)
from gemma_dist.config_data import FOLDER, MAPPING
from gemma_dist.costs import cost_of
from gemma_dist.errors import ConfigError, brief, shortened
from gemma_dist.shipped import recipes, shipped_recipe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

S = TypeVar("S", bound=Section)

SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": TrainDataConfig,
    "quantization": QuantizationConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
}
WRITE_YAML = "a value that holds : # [ { or a tab stands in quotes, and launch/ has recipes to compare with"
# Every setting of a recipe by its dotted key. The names after the dot are distinct, so that an override may be bare.
KEYS = ["tuning", *(f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields)]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `key=value` overrides describe.

    Raises:
        ConfigError: the file cannot be read, or some settings are wrong: the message lists every problem found.
    """
    values = read_recipe(Path(path))
    problems = _apply_overrides(values, overrides)
    unknown = _take_out_unknown(values)  # first, so that pydantic can check the rest and report it in the same go
    unknown = {key: problem + cost_of(_bare(key), values) for key, problem in unknown.items()}
    problems += unknown.values()
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _messages(error, reported=unknown)
    if config is None or problems:
        title = f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n".join([title, *problems]))
    return config


def load_section(kind: type[S], options: Mapping[str, object]) -> S:
    """A section of its own, from the options of a command.

    Raises:
        ConfigError: a value is not allowed; the message names it as typed (--max-length for `max_length`).
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = str(item["loc"][0])
            problems.append(
                f"{option(name)} {shortened(str(item['input']))}: {_rule(item)}. {kind.model_fields[name].description}"
            )
        raise ConfigError("\n".join(problems)) from None


def _messages(error: ValidationError, reported: Container[str]) -> Iterator[str]:
    """Pydantic's findings as `dotted.key = value: rule. What the setting means`; keys of `reported` are not missing."""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if part not in (FOLDER, MAPPING))
        rule = _rule(item)
        if item["type"] == "missing":
            if key not in reported:
                yield f"{key}: missing. {_description(key)}".rstrip()
        elif key and (item["input"] is None or (isinstance(item["input"], str) and not item["input"].strip())):
            yield f"{key}: has no value; write one{_or_else(key)}. {_description(key)}".rstrip()  # `key=`, `key: ''`
        elif key:
            yield f"{key} = {brief(item['input'])}: {rule}. {_description(key)}".rstrip()
        else:
            yield from rule.splitlines()  # a cross-check: each line names its keys


def _rule(item: "ErrorDetails") -> str:
    """What a finding of pydantic says, in words that need no knowledge of it."""
    if item["type"] == "value_error":  # of config.py: its words alone, without pydantic's "Value error" before them
        return str(item["ctx"]["error"])
    if item["type"] == "extra_forbidden":  # within an element of a list
        return "unknown key"
    if item["type"] == "path_type":
        given = item["input"]
        named = f", such as ./{given}" if isinstance(given, int | float) and not isinstance(given, bool) else ""
        return f"this is no path; write one{named}"
    if item["type"] == "string_pattern_mismatch":  # the setting's own sentence has an example
        return "it is not of the form that is wanted"
    return item["msg"]


# ---- overrides -------------------------------------------------------------------------------------------------------


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `key=value` in `values`; a bare key finds its section. Returns the problems of malformed ones.

    Raises:
        ConfigError: a value is not YAML.
    """
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or key.startswith("-"):
            problems.append(
                f"override {brief(override)}: write key=value without blanks, such as learning_rate=1e-4 or lora.r=8"
            )
            continue
        known = _keys_named(key)
        dotted = known[0] if len(known) == 1 else key
        section, _, name = dotted.partition(".")
        parsed = _parse_yaml(value, f"override {brief(override)}")
        if not name or section not in SECTIONS:
            values[key] = parsed
        elif values.get(section) is None:
            values[section] = {name: parsed}
        elif isinstance(values[section], dict):
            values[section][name] = parsed
        # else: a section that is no mapping is reported by _take_out_unknown
    return problems


def given_twice(overrides: Sequence[str]) -> list[str]:
    """What to say of each key that `key=value` overrides give several values, the last of which is taken."""
    values: dict[str, list[str]] = {}
    for key, _, value in (override.partition("=") for override in overrides):
        known = _keys_named(key)
        values.setdefault(known[0] if len(known) == 1 else key, []).append(value)
    return [
        f"{key} is given {len(given)} times ({', '.join(map(shortened, given))}): {shortened(given[-1])}, the last, is "
        "taken"
        for key, given in values.items()
        if len(set(given)) > 1
    ]


def _keys_named(name: str) -> list[str]:
    """The keys of a recipe that are `name` behind their section."""
    return [key for key in KEYS if key.rpartition(".")[2] == name]


# ---- unknown keys ----------------------------------------------------------------------------------------------------


def _take_out_unknown(values: dict[str, Any]) -> dict[str, str]:
    """Remove from `values`, what the YAML file says, all that no recipe holds. Returns a message for each, by its
    dotted key."""
    problems = {}
    for key in list(values):
        if key not in RunConfig.model_fields:
            problems[str(key)] = f"{key} = {brief(values.pop(key))}: unknown key; {_hint(str(key))}"
        elif key not in SECTIONS:
            continue  # a setting without a section
        elif values[key] is None:
            del values[key]  # a section with all its lines commented out
        elif isinstance(values[key], dict):
            problems |= _take_out_unknown_of(key, values[key])
        else:
            first_setting = next(iter(SECTIONS[key].model_fields))
            hint = _hint(key) if key in RENAMED else f"for example {key}.{first_setting}"
            problems[key] = f"{key} = {brief(values.pop(key))}: {key} is a section of settings; {hint}"
    return problems


def _take_out_unknown_of(section: str, values: dict[str, Any]) -> dict[str, str]:
    """`_take_out_unknown` of one section, whose `values` are by bare names."""
    problems = {}
    for name in list(values):
        if name not in SECTIONS[section].model_fields:
            key = f"{section}.{name}"
            problems[key] = f"{key} = {brief(values.pop(name))}: unknown key; {_hint(key)}"
    return problems


def _hint(key: str) -> str:
    """What to write instead of an unknown `key`: another tool's name, a forgotten section, or the nearest spelling."""
    name = _bare(key)
    if name in NOT_SETTINGS:
        return NOT_SETTINGS[name]
    if known := _keys_named(name):
        return f"here it is {' or '.join(known)}"
    if name in RENAMED:
        return f"here it is {RENAMED[name]}. {_description(RENAMED[name])}"
    if name in ShardConfig.model_fields:
        return f"{name} is {_decided_at_sharding(name)}"
    if name in RENAMED_OPTIONS:
        ours = RENAMED_OPTIONS[name]
        return f"here it is {ours}, {_decided_at_sharding(ours)}. {ShardConfig.model_fields[ours].description}"
    return _nearest(key, name)


def _bare(key: str) -> str:
    """The name of a key without its section, as it would be written here."""
    return key.rpartition(".")[2].replace("-", "_").lower()


def _decided_at_sharding(name: str) -> str:
    """The end of a sentence about a setting of ShardConfig, which a recipe cannot change any more."""
    return f"decided when rows are sharded, so give {option(name)} to `gemma-dist shard`"


def _nearest(key: str, name: str) -> str:
    """The setting that is spelled most like `key`, or like its `name` without a section."""
    spellings = {}  # with a section and without -> what is recommended
    for ours in ShardConfig.model_fields:
        spellings[ours] = spellings[f"data.{ours}"] = ours
    for ours in KEYS:
        spellings[ours] = spellings[ours.rpartition(".")[2]] = ours
    for spelling in (key, name):
        if close := difflib.get_close_matches(spelling, spellings, n=1):
            return f"did you mean {spellings[close[0]]}?"
    return "`gemma-dist check` shows every setting of a recipe"


def _or_else(key: str) -> str:
    """What can be done instead of giving a setting a value."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    if field is None or field.is_required() or key == "data.train":
        return ""
    return ", or [] for none" if field.default == [] else ", or leave the key out for its default"


def _description(key: str) -> str:
    """The sentence under a setting, or the first line about a section; empty for what is neither."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        field = RunConfig.model_fields.get(section)
    elif not name:
        return (SECTIONS[section].__doc__ or "").partition("\n")[0]
    else:
        field = SECTIONS[section].model_fields.get(name.partition(".")[0])  # before the index of a list's element
    return (field.description or "") if field else ""


# ---- YAML ------------------------------------------------------------------------------------------------------------


def read_recipe(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, unchecked.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if found := shipped_recipe(path):
            return read_recipe(found)
        close = difflib.get_close_matches(path.stem, [one.name for one in recipes()], n=1)
        meant = f"did you mean {close[0]}? " if close and path.parent == Path() else ""
        raise ConfigError(f"{path}: no such file; {meant}`gemma-dist recipes` lists those to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; name a recipe, a YAML file like those in launch/") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a recipe is a YAML file like those in launch/") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: it says nothing; a recipe is a YAML file like those in launch/")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model, data, train …), not {brief(values)}")
    return values


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars, so that 1e-4 is a number and a date is a string (PyYAML has 1.1's); no key may repeat."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's own takes the last value of a repeated key: a setting further up would be lost without a word."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


# Kind, pattern, and the characters that such a scalar may start with.
for _kind, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", [*"-+0123456789"]),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", [*"-+."]),
]:
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def _parse_yaml(text: str, origin: str) -> object:
    """The value of a YAML string. A ConfigError begins with `origin`, the file or the override: `lora.yaml:7: …`."""
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.MarkedYAMLError as error:
        if error.problem_mark and "\n" in text:
            origin = f"{origin}:{error.problem_mark.line + 1}"
        raise ConfigError(f"{origin}: not YAML: {error.problem}; {WRITE_YAML}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not YAML: {shortened(str(error))}; {WRITE_YAML}") from None
