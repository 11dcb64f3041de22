"""The settings of config.py as options of commands, and remedies in the words of the command that runs.

Nothing heavy is imported before a command is called, not even the settings, which need pydantic.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from click.core import ParameterSource

from gemma_dist.aliases import current_value
from gemma_dist.errors import GemmaDistError, spell
from gemma_dist.visible import shown

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from gemma_dist.config import Section


class ExistingPath(click.Path):
    """A file or folder of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. A URL is refused with what takes it."""
        if "://" in str(value) and not Path(value).exists():
            instead = (
                "rows of the hub are taken by `gemma-dist shard` and `gemma-dist init`: name the folder that `shard` "
                "makes of them"
                if str(value).startswith("hf://datasets/")
                else "name a path"
            )
            self.fail(f"{str(value)!r} is a URL, and this takes what lies on a disk; {instead}", param, ctx)
        return super().convert(value, param, ctx)


EXISTING = ExistingPath(exists=True, path_type=Path)
NEW = click.Path(path_type=Path)
WORDS = ("auto", "true", "false", "yes", "no", "on", "off")  # what follows an option, where it is no path


def say(text: str, *, exact: bool = False, nl: bool = True) -> None:
    """Print what a person asked for, as `shown` has it; or `exact`, where it is JSON, or has been made visible."""
    click.echo(text if exact else shown(text), nl=nl)


def refuse_idle(where: str, *names: str, remedy: str = "leave one of the two out") -> None:
    """UsageError where an option of the running command is given that says nothing `where`: "where --json is given"."""
    context = click.get_current_context()
    for param in context.command.get_params(context):
        if param.name in names and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{max(param.opts, key=len)} says nothing {where}; {remedy}")


def refuse_idle_sampling(temperature: float) -> None:
    """UsageError where it is said how to draw, and nothing is drawn."""
    from gemma_dist.config import option

    if temperature == 0:
        remedy = f"give {option('temperature')} 1, or leave it out"
        refuse_idle("at a temperature of 0", "top_p", "top_k", remedy=remedy)


def refuse_idle_length(max_length: int | None) -> None:
    """UsageError where it is said what becomes of longer rows, and none is too long."""
    from gemma_dist.config import option

    if max_length is None:
        refuse_idle(f"without {option('max_length')}", "too_long", remedy="give that, or leave it out")


class OrderedGroup(click.Group):
    """Commands in the order in which they are written. Each spells the remedies of errors its own way."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added; click would sort them by name."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command and its words, checked."""
        name, command, words = super().resolve_command(ctx, args)
        return name, command, _checked_words(words)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and put into a user error's words how this command takes the settings that it names."""
        try:
            return super().invoke(ctx)
        except GemmaDistError as error:
            command = self.commands[str(ctx.invoked_subcommand)]
            error.args = (spell(str(error), spellings(command)),)
            raise


def _checked_words(words: list[str]) -> list[str]:
    """Words of a command, ~/ as the home that shells leave in quotes and behind --out=. UsageError where one is
    empty, as of a variable that a shell does not know: as a path, it would be the current folder."""
    checked = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if (equals or not option) and not value.strip():
            option = option or (before if before.startswith("--") and "=" not in before else "")
            what = f"{option} has no value" if option else "an argument is empty"
            raise click.UsageError(f"{what}; write one, or leave it out. Is a variable of your shell unset?")
        if value.startswith("~/"):
            from gemma_dist.settings import at_home

            word = f"{option}{equals}{at_home(value)}"
        checked.append(word)
    return checked


class SettingsCommand(click.Command):
    """A command with an option for each setting of a section of config.py; its function gets them as `settings`.

    `section` picks the class from the module config, which is first imported when a command is called or asked for its
    own help. `beside` does the same for more sections, by the names of the function's arguments.
    """

    def __init__(
        self,
        *args: Any,
        section: Callable[[Any], "type[Section]"],
        beside: Mapping[str, Callable[[], "type[Section]"]] = types.MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._pick_section, self._beside = section, beside

    @functools.cached_property
    def sections(self) -> "dict[str, type[Section]]":
        """The classes of the settings, by the arguments that take them."""
        from gemma_dist import config

        return {"settings": self._pick_section(config), **{name: pick() for name, pick in self._beside.items()}}

    @functools.cached_property
    def setting_options(self) -> list[click.Option]:
        """One option for each setting."""
        fields = (section.model_fields.items() for section in self.sections.values())
        return [_option_of(name, field) for name, field in chain.from_iterable(fields)]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own options, then one for each setting, and --help last."""
        *params, help_option = super().get_params(ctx)
        return [*params, *self.setting_options, help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The bare flag of before, --enable-thinking, stands for --enable-thinking true."""
        from gemma_dist.config import option

        words = []
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            is_bare = word == option("enable_thinking") and following.lower() not in WORDS
            words.append(f"{word}=true" if is_bare else word)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: click.Context) -> Any:
        """Check the settings and hand them to the command's function. Raises ConfigError, with all that is wrong."""
        from gemma_dist.recipe import load_section

        for argument, section in self.sections.items():
            values = {name: ctx.params.pop(name) for name in section.model_fields}
            ctx.params[argument] = load_section(section, values)
        return super().invoke(ctx)


def _option_of(name: str, field: "FieldInfo") -> click.Option:
    """The option for a setting, with the name, values, default and sentence that config.py gives it."""
    from gemma_dist.config import option

    kind = field.annotation
    if get_origin(kind) in (types.UnionType, Union):  # with None, which is to leave the option out
        kind = get_args(kind)[0]
    choices = [word(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
    can_be_left_out = kind is bool and field.default is True
    return click.Option(
        [f"{option(name)}/{option(f'no_{name}')}" if can_be_left_out else option(name)],
        type=SettingChoice(choices) if choices else kind,
        is_flag=kind is bool,
        default=word(field.default) if choices and field.default is not None else field.default,
        show_default=field.default is not None,
        help=field.description,
    )


def word(value: object) -> str:
    """A value of a setting as a recipe and the command line spell it: true for True."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class SettingChoice(click.Choice):
    """The values that a setting may have, also by their names in earlier versions."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A value as it is written today, if it is one of them."""
        return super().convert(current_value(value), param, ctx)


class WeightedFolder(click.ParamType):
    """FOLDER or FOLDER=WEIGHT, as the pair. A folder that exists under the whole name is taken so, with weight 1."""

    name = "folder[=weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        """The folder and its weight."""
        if isinstance(value, tuple):
            return value
        folder, equals, text = value.rpartition("=")
        if Path(value).exists() or not equals:
            return EXISTING.convert(value, param, ctx), 1.0
        try:
            weight = float(text)
        except ValueError:
            self.fail(
                f"{value!r}: {text!r} is no number, and no folder has the whole name; write FOLDER, or FOLDER=0.5",
                param,
                ctx,
            )
        if not math.isfinite(weight):
            self.fail(f"{value!r}: the weight must be finite", param, ctx)
        return EXISTING.convert(folder, param, ctx), weight


def spellings(command: click.Command) -> dict[str, str]:
    """How a user of `command` changes each setting that a remedy may name, with {} for the value: by an option of the
    command, by a key of its recipe, or else by the command that decides the setting."""
    from gemma_dist.config import ModelConfig, ShardConfig, TrainDataConfig, option
    from gemma_dist.config_merge import MergeConfig

    params = command.get_params(click.Context(command))
    own = {param.name for param in params if isinstance(param, click.Option)}
    takes_recipe = any(param.name == "overrides" for param in params)
    spelled = {}
    sections = (ShardConfig, TrainDataConfig, MergeConfig, ModelConfig)
    for name in dict.fromkeys(name for section in sections for name in section.model_fields):
        if name in own:
            spelled[name] = f"{option(name)} {{}}"
        elif name in ModelConfig.model_fields:
            spelled[name] = f"model.{name}={{}}" if takes_recipe else f"`gemma-dist train … model.{name}={{}}`"
        elif name in TrainDataConfig.model_fields:
            spelled[name] = f"data.{name}={{}}" if takes_recipe else f"`gemma-dist train … data.{name}={{}}`"
        elif name in ShardConfig.model_fields:
            spelled[name] = f"`gemma-dist shard … {option(name)} {{}}`"
        else:
            spelled[name] = f"`gemma-dist merge … {option(name)} {{}}`"
    return spelled
