"""`gemma-dist init --from`: a recipe from a config of another tool."""

import shlex
from pathlib import Path

from gemma_dist.config import option
from gemma_dist.errors import ConfigError
from gemma_dist.files import put
from gemma_dist.translate import translate_file


def init_from(out: Path, theirs: Path) -> str:
    """Write OUT/recipe.yaml, which says at its end what of `theirs` has no place in it; what was written, and the
    commands that come next.

    Raises:
        ConfigError: `theirs` is of no tool that is known, or OUT/recipe.yaml is there.
    """
    translated, path = translate_file(theirs), out / "recipe.yaml"
    if path.exists():
        raise ConfigError(f"{path} is there already; name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    put(path, translated.to_yaml().encode())
    quoted = shlex.quote(str(path))
    model = translated.recipe.get("model", {}).get("model_name_or_path", "MODEL")
    return "\n".join(
        [
            f"wrote {path}, from a config of {translated.tool}",
            *(f"left out, {said}: {why}" for said, why in translated.left_out.items()),
            *(f"to be settled in it: {problem}" for problem in translated.problems),
            "next:",
            *(f"  {command}" for command in translated.shard_commands(str(model))),
            f"  gemma-dist check {quoted} {option('accelerate_config')} accelerate_configs/NAME.yaml",
            f"  gemma-dist plan {quoted} --gpu-memory SIZE",
        ]
    )
