"""The tools of a conversation: declarations in a file, or functions of the user's own, and what these return.

--tools tools.json          declarations, in any form that a row may have: the user types what the tools answer
--tools my_tools:search     a function, or a list or dict of functions, of a module in this folder or on Python's path
"""

import asyncio
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_dist.data.strict import parse_json, reason
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.files import naming

Function = Callable[..., object]
_SUCH_AS = "such as my_tools:search for the function `search` of my_tools.py in this folder"


@dataclass(frozen=True)
class Tools:
    """What the model may call."""

    declared: Any = None  # as a row's `tools`
    functions: Mapping[str, Function] = field(default_factory=dict)  # by the names that are declared


@dataclass(frozen=True)
class Result:
    """What a tool's message says: text, and the files of images behind it."""

    text: str
    images: tuple[bytes, ...] = ()


def load_tools(given: str) -> Tools:
    """The tools that `--tools` names.

    Raises:
        ConfigError: it is neither a file nor a function, or a function says too little of itself.
        DataError: the file is not JSON.
    """
    path = Path(given)
    if path.is_file():
        with naming(path):
            text = path.read_bytes()
        try:
            return Tools(parse_json(text.decode("utf-8-sig")))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {reason(error)}; write a list of declarations as JSON") from None
    if given.endswith(".json") or ":" not in given:
        raise ConfigError(f"--tools {given} is neither a file nor MODULE:FUNCTION, {_SUCH_AS}")
    functions = load_functions(given)
    return Tools(declare(functions), functions)


def load_functions(given: str) -> dict[str, Function]:
    """The functions, by name, that MODULE:FUNCTION names: one, those of a list, or of a dict. ConfigError: it names
    none."""
    if given.endswith(".json") or Path(given).is_file():
        raise ConfigError(
            f"--tools {given} names a file, and calls are run by functions: name these as MODULE:NAME, {_SUCH_AS}. "
            "Declarations stand in the rows' `tools`, or are made from the functions' type hints and docstrings"
        )
    found = load(given, "--tools")
    listed = found if isinstance(found, list | tuple) else [found]
    functions = found if isinstance(found, dict) else {getattr(one, "__name__", str(one)): one for one in listed}
    if not functions or not all(map(callable, functions.values())) or len(functions) < len(listed):
        raise ConfigError(f"--tools {given} is neither a function nor a list or dict of functions with different names")
    return functions


def load(given: str, option: str) -> Any:
    """What MODULE:NAME names. The module is of the user's own choice, and runs. ConfigError, with the `option` that was
    given: it cannot be loaded."""
    module, colon, name = given.partition(":")
    if not colon or not name:
        raise ConfigError(f"{option} {given} is no MODULE:FUNCTION, {_SUCH_AS}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module raises as it is imported
        raise ConfigError(f"{option} {given} cannot be loaded: {type(error).__name__}: {error}") from error
    return found


def declare(functions: Mapping[str, Function]) -> list[dict[str, Any]]:
    """The declarations of functions. ConfigError: one says too little of itself."""
    return [_declaration(name, function) for name, function in functions.items()]


def _declaration(name: str, function: Function) -> dict[str, Any]:
    """What transformers makes of a function's type hints and docstring, which are what the model reads of it."""
    from transformers.utils import get_json_schema

    try:
        declared = get_json_schema(function)
    except Exception as error:  # two types of its own, and whatever inspecting raises
        raise ConfigError(
            f"the tool {name} cannot be declared: {error} Give it type hints, and a docstring with an `Args:` that has "
            "a line for each argument"
        ) from error
    declared["function"]["name"] = name
    return declared


def run(function: Function, arguments: Mapping[str, Any]) -> Result:
    """Call a function; what it raises is the model's to read."""
    try:
        value = function(**arguments)
        return as_result(asyncio.run(value) if inspect.iscoroutine(value) else value)
    except KeyboardInterrupt:
        return Result("Error: the user interrupted this call.")
    except (Exception, SystemExit) as error:
        return Result(f"Error: {type(error).__name__}: {error}")


def as_result(value: object) -> Result:
    """What a function returned: text, a picture (of PIL's, or the `Path` of a file), or a list of these; of anything
    else, its JSON. OSError where there is no such file."""
    if isinstance(value, list | tuple) and any(map(_is_picture, value)):
        parts = [as_result(one) for one in value]
        return Result(
            "\n".join(part.text for part in parts if part.text), tuple(image for part in parts for image in part.images)
        )
    if isinstance(value, Path):
        return Result("", (value.read_bytes(),))
    if _is_picture(value):
        file = io.BytesIO()
        value.save(file, "PNG")  # type: ignore[attr-defined]
        return Result("", (file.getvalue(),))
    return Result(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _is_picture(value: object) -> bool:
    from PIL import Image

    return isinstance(value, Path | Image.Image)
