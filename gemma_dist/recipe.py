"""Read a recipe."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from gemma_dist.aliases import NOT_SETTINGS, RENAMED
from gemma_dist.config import (
    SHARDING_ONLY,
    DataConfig,
    LoraConfig,
    ModelConfig,
    QuantizationConfig,
    RunConfig,
    Section,
    TrainConfig,
    at_sharding,
    option,
)
from gemma_dist.errors import ConfigError

# ---- reading a recipe ------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `key=value` overrides describe. ConfigError lists every problem that was found."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; recipes to start from are in launch/") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ConfigError(f"{path}: not a text file; a recipe is a YAML file like those in launch/") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model, data, train …), not {values!r}")
    problems = list(_apply_overrides(values, overrides))
    return _validated(RunConfig, values, problems, origin=str(path))


def load_section(kind: type[S], options: Mapping[str, Any]) -> S:
    """A section of its own, from the options of a verb (`max_length` stands for --max-length in messages)."""
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{option(str(item['loc'][0]))} {item['input']}: {item['msg']}. "
                f"{kind.model_fields[str(item['loc'][0])].description}"
                for item in error.errors()
            )
        ) from None


def _validated(kind: type[S], values: dict[str, Any], problems: list[str], *, origin: str) -> S:
    """`values` as a `kind`. Unknown keys are taken out first, so that pydantic can report the rest in the same go."""
    problems += _take_out_unknown(kind, values)
    config = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        reported = tuple(problem.partition(" = ")[0] for problem in problems)
        problems += [
            message for message in _messages(error) if not message.startswith(tuple(f"{k}: missing" for k in reported))
        ]
    if config is None or problems:
        raise ConfigError("\n".join([f"{origin}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))
    return config


def _messages(error: ValidationError) -> Iterator[str]:
    """Pydantic's findings as `dotted.key = value: rule (what the setting means)`."""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "value_error" and not item["loc"]:
            yield from str(item["ctx"]["error"]).splitlines()  # our own cross-checks name their keys themselves
        elif item["type"] == "missing":
            yield f"{key}: missing. {_description(key)}".rstrip()
        else:
            rule = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
            yield f"{key} = {item['input']!r}: {rule}. {_description(key)}".rstrip()


# ---- keys: what exists, and what people bring along ------------------------------------------------------------------

SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "quantization": QuantizationConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
}
KEYS = ["tuning", *(f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields)]


def _hint(key: str) -> str:
    """What to write instead of an unknown `key`: another tool's name, a forgotten section, or the nearest spelling."""
    bare = key.rpartition(".")[2].replace("-", "_").lower()
    if bare in NOT_SETTINGS:
        return NOT_SETTINGS[bare]
    if same := [known for known in KEYS if known.rpartition(".")[2] == bare]:
        return f"here it is {' or '.join(same)}"
    if bare in RENAMED:
        ours = RENAMED[bare]
        name = ours.removeprefix("data.")
        return f"here it is {ours}{f', {at_sharding(name)}' if name in SHARDING_ONLY else ''}. {_description(ours)}"
    by_name = {name: known for known in KEYS for name in (known, known.rpartition(".")[2])}
    close = difflib.get_close_matches(key, by_name, 1) or difflib.get_close_matches(bare, by_name, 1)
    return f"did you mean {by_name[close[0]]}?" if close else "`gemma-dist check` shows every setting of a recipe"


def _description(key: str) -> str:
    """The sentence under a setting, or the first line about a section."""
    section, _, name = key.partition(".")
    if section in SECTIONS and not name:
        return (SECTIONS[section].__doc__ or "").partition("\n")[0]
    field = SECTIONS.get(section, RunConfig).model_fields.get(name.partition(".")[0] or section)
    return (field.description or "") if field else ""


def _take_out_unknown(kind: type[Section], values: dict[str, Any]) -> Iterator[str]:
    """Remove what RunConfig does not know from `values`, one message each."""
    for key in list(values):
        if key not in kind.model_fields:
            yield f"{key} = {values.pop(key)!r}: unknown key; {_hint(str(key))}"
        elif key in SECTIONS and values[key] is None:
            del values[key]  # a section with all its lines commented out
        elif key in SECTIONS and not isinstance(values[key], dict):
            hint = _hint(key) if key in RENAMED else f"for example {key}.{next(iter(SECTIONS[key].model_fields))}"
            yield f"{key} = {values.pop(key)!r}: {key} is a section of settings; {hint}"
        elif key in SECTIONS:
            section = values[key]
            for name in [name for name in section if name not in SECTIONS[key].model_fields]:
                dotted = f"{key}.{name}"
                yield f"{dotted} = {section.pop(name)!r}: unknown key; {_hint(dotted)}"


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> Iterator[str]:
    """Set each `key=value` in `values`; a bare key finds its section. Yields what cannot be understood."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            yield f"override {override!r}: write key=value, such as learning_rate=1e-4 or lora.r=8"
            continue
        value = _parse_yaml(text, f"override {override!r}")
        homes = [known for known in KEYS if known.rpartition(".")[2] == key]
        section, _, name = (homes[0] if len(homes) == 1 else key).partition(".")
        if not name or section not in SECTIONS:
            values[key] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
        elif values[section] is None:
            values[section] = {name: value}


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars, so that 1e-4 is a number and a date is text (PyYAML has 1.1's); repeated keys are refused."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", [*"-+0123456789"]),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", [*"-+."]),
]:
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{origin}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not YAML: {error}") from None
