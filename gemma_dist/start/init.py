"""`gemma-dist init`: from a model, its data and the GPUs to the files of a run.

    OUT/recipe.yaml         a recipe of launch/ for that model, the first that is planned to fit
    OUT/accelerate.yaml     how the processes share memory  (OUT/deepspeed_*.json beside it, at ZeRO)
    OUT/train.sbatch        the same on Slurm; with the scripts that it calls, in slurm/

Comments of the recipe stay, since they say what to change when.
"""

import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_dist.config import RunConfig, option
from gemma_dist.data.inputs import HUB, find_inputs
from gemma_dist.data.rows import read_rows
from gemma_dist.errors import ConfigError
from gemma_dist.family import SIZES, known_config
from gemma_dist.files import put
from gemma_dist.model.folder import read_model_config
from gemma_dist.plan.margin import GIB, read_margin
from gemma_dist.plan.run import Plan, Request, make_plan
from gemma_dist.recipe import load_config
from gemma_dist.shards.fetch import is_url
from gemma_dist.shards.reader import is_shard_folder, open_shards
from gemma_dist.shipped import PROCESSES, RECIPES, SCRIPTS, Recipe, copy_folder, recipes, shipped
from gemma_dist.topology import read_topology, require_fit

CPUS_PER_GPU = 12  # of a batch job, as slurm/train.sbatch asks for
CALLED = ("common.sh", "leader.sh", "outcome.sh")  # of slurm/, by a batch job
OFFLOAD = "_offload"  # at the end of a name: the same launch, with weights and states in host memory
SIZE_OF_OTHERS = "E4B"  # whose recipes a model of no known size gets
_PLAIN = re.compile(r"[\w./~:-]+")  # a string that YAML takes without quotes


@dataclass(frozen=True)
class Wish:
    """What a run is to be."""

    model: str
    data: str  # rows, or shards
    num_gpus: int  # of each node; 0: on the CPU
    gpu_memory: float | None  # GB of each, as sold
    num_nodes: int = 1
    tuning: str | None = None  # None: an adapter, on a base in 16 bits where several GPUs hold it, else in 4 bits

    @property
    def num_processes(self) -> int:
        """Of all nodes."""
        return max(1, self.num_gpus) * self.num_nodes


@dataclass(frozen=True)
class Written:
    """What `init` did."""

    files: list[Path]
    plan: Plan
    commands: list[str]  # what comes next
    left_alone: str = ""  # what was there, and is not as the files that were written need it

    def render(self) -> str:
        """For people."""
        what = "for the CPU, whose memory is not planned"
        if self.plan.gpu_memory is not None:
            what = f"planned: {self.plan.needed / GIB:.1f} GiB of {self.plan.gpu_memory:g} on each GPU"
        wrote = (f"wrote {path}" for path in self.files)
        left_alone = [f"left as it was: {self.left_alone}"] if self.left_alone else []
        return "\n".join([*wrote, *left_alone, what, "next:", *(f"  {command}" for command in self.commands)])


def init(out: Path, wish: Wish) -> Written:
    """Write the files of a run to `out`, which may be there already, but none of them.

    Raises:
        ConfigError: one of them is there, nothing of that model fits on such GPUs, or the wish contradicts itself.
        CheckpointError: there is no such model.
        DataError: the shards are not readable.
    """
    if wish.num_gpus and wish.gpu_memory is None:
        raise ConfigError("how much memory a GPU has is not known; give its size as sold, as in --gpu-memory 24GB")
    changes = {
        "model_name_or_path": wish.model,
        "train": wish.data if _is_shards(wish.data) else str(out / "shards"),
        "output_dir": str(out / ("model" if wish.tuning == "full" else "adapter")),
    }
    recipe, processes, plan = _choose(wish, changes)
    changes |= _sizes(plan)
    names = ["recipe.yaml", *_process_files(processes, out, wish), "train.sbatch"]
    if taken := [out / name for name in names if (out / name).exists()]:
        raise ConfigError(f"{taken[0]} is there already; name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    commands = _commands(out, wish, processes, plan.config, changes["train"])
    files = {"recipe.yaml": _recipe_text(recipe, changes, commands, processes), **_process_files(processes, out, wish)}
    files["train.sbatch"] = _batch_script(out, wish)
    for name, text in files.items():
        put(out / name, text.encode())
    written = [out / name for name in files]
    left_alone = _other_scripts(out)
    if not Path(SCRIPTS).exists():
        copy_folder(SCRIPTS, Path(SCRIPTS))
        written.append(Path(SCRIPTS))
    load_config(out / "recipe.yaml")  # what was written is what was planned
    return Written(written, plan, commands, left_alone)


def require_data(data: str) -> None:
    """Raises DataError where there are neither rows nor shards of that name. Nothing is fetched."""
    if not _is_shards(data) and not is_url(data):
        next(read_rows(find_inputs([data])), None)  # whatever it is: sharding says what is wrong with a row


# ---- which recipe ----------------------------------------------------------------------------------------------------


def _choose(wish: Wish, changes: Mapping[str, str]) -> tuple[Recipe, str, Plan]:
    """The recipe, the name of its accelerate config, and its plan: the first that fits. ConfigError where none does."""
    tried = []
    for recipe, processes in _candidates(wish):
        plan = _plan(recipe, processes, wish, changes)
        if plan.fits is not False:
            return recipe, processes, plan
        tried.append(f"  {recipe.name} with {processes}: {plan.needed / GIB:.1f} GiB on each GPU")
    gpus = f"{wish.num_processes} x {wish.gpu_memory or 0:g} GB"
    if not tried:
        raise ConfigError(
            f"no recipe has tuning: {wish.tuning} for {wish.model} on {gpus}; leave --tuning out, or start from one of "
            "`gemma-dist recipes`"
        )
    raise ConfigError(
        "\n".join([f"{wish.model} does not fit on {gpus}, as planned:", *tried])
        + "\nName more or larger GPUs, or a smaller model; `gemma-dist plan` says what would save some of it"
    )


def _candidates(wish: Wish) -> Iterator[tuple[Recipe, str]]:
    """Recipes for the model with the accelerate config of each, the most wanted first: partitioned over several GPUs
    before 4 bits on each, larger before smaller, all on the GPUs before a part in host memory."""
    if not wish.num_gpus:
        tuning = wish.tuning or "lora"
        yield from ((one, "single") for one in recipes() if one.name == f"cpu_{tuning}")
        return
    size = _size_of(wish.model).partition("-")[0].lower()
    own = [one for one in recipes() if one.name.startswith(f"{size}_") and f"_{wish.tuning or ''}" in one.name]
    wanted = [one for one in own if wish.tuning == "full" or "_full_" not in one.name]
    for one in sorted(wanted, key=lambda one: (one.processes is None, -(one.gpu_memory or 0))):
        if one.processes is not None and wish.num_processes > 1:
            on_gpus = one.processes.removesuffix(OFFLOAD)
            yield from ((one, processes) for processes in dict.fromkeys((on_gpus, one.processes)))
        elif one.processes is None:
            yield one, "ddp" if wish.num_processes > 1 else "single"


def _size_of(model: str) -> str:
    """The one of SIZES that a model has, by its name on the hub, or by its config; another one's are like E4B's."""
    for size in SIZES:
        if size.lower() in model.rpartition("/")[2].lower():
            return size
    if known_config(model) is None and Path(model).is_dir():
        text = read_model_config(model, f"--model {model}").get("text_config", {})
        for size in SIZES:
            known = (known_config(f"google/gemma-4-{size}") or {})["text_config"]
            if all(text.get(key) == known[key] for key in ("hidden_size", "num_hidden_layers")):
                return size
    return SIZE_OF_OTHERS


def _plan(recipe: Recipe, processes: str, wish: Wish, changes: Mapping[str, str]) -> Plan:
    """The plan of a recipe for these GPUs, with a global batch that the ranks can share and packs that hold every
    trajectory of the shards."""
    path = shipped(RECIPES) / f"{recipe.name}.yaml"
    own = load_config(path).train
    sections = {"model_name_or_path": "model", "train": "data", "output_dir": "train"}
    words = [f"{sections[key]}.{key}={json.dumps(value)}" for key, value in changes.items()]
    step = wish.num_processes * own.per_device_train_batch_size
    if own.global_batch_size:
        words.append(f"train.global_batch_size={-(-own.global_batch_size // step) * step}")
    if own.packing_length and _is_shards(wish.data):
        words.append(f"train.packing_length={max(own.packing_length, _longest(wish.data))}")
    config = load_config(path, words)
    with tempfile.TemporaryDirectory() as temporary:
        for name, text in _process_files(processes, Path(temporary), wish).items():
            (Path(temporary) / name).write_text(text, encoding="utf-8")
        topology = replace(read_topology(Path(temporary) / "accelerate.yaml"), name=processes)
    require_fit(config, topology)
    return make_plan(config, topology, read_margin(), Request(wish.gpu_memory))


def _is_shards(data: str) -> bool:
    """Whether the data of a wish are shards already; what the hub has are rows."""
    return is_shard_folder(data) and not data.startswith(HUB)


def _longest(shards: str) -> int:
    """Tokens of the longest trajectory."""
    found = open_shards(shards)
    return int((found.num_text_tokens + found.num_image_tokens).max())


def _sizes(plan: Plan) -> dict[str, str]:
    """The settings of a plan that may differ from its recipe's."""
    train = plan.config.train
    values = {"global_batch_size": train.global_batch_size, "packing_length": train.packing_length}
    return {name: str(value) for name, value in values.items() if value}


# ---- files -----------------------------------------------------------------------------------------------------------


def _recipe_text(recipe: Recipe, changes: Mapping[str, str], commands: list[str], processes: str) -> str:
    """The recipe with some settings changed, and a comment of its own in the place of commands that it names."""
    text = (shipped(RECIPES) / f"{recipe.name}.yaml").read_text(encoding="utf-8")
    text = re.sub(r" \\\n# +", " ", text)  # a command over two lines is one
    kept = [line for line in text.splitlines() if not line.startswith(("# plan:", "#   gemma-dist", "#   accelerate"))]
    head = ["# As `gemma-dist init` wrote it:", "#", *(f"#   {command}" for command in commands), "#"]
    if recipe.processes == processes + OFFLOAD:
        head += [f"# Here the GPUs hold all ({processes}): what is said of host memory is of {recipe.processes}.", "#"]
    rest = (line for line in kept if line != "#" and not line.startswith("#   sbatch"))
    text = "\n".join([*head, *rest]) + "\n"
    for key, value in changes.items():
        text = _set(text, key, value)
    return text


def _set(text: str, key: str, value: str) -> str:
    """A line of YAML, `  key: value  # why`, with another value; all else stays."""
    written = value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    text, found = re.subn(rf"(?m)^(\s*{key}: )(\S+)", lambda line: line[1] + written, text)
    assert found == 1, f"{key}: {found} lines"
    return text


def _process_files(processes: str, folder: Path, wish: Wish) -> dict[str, str]:
    """The accelerate config by its name, and what it names itself, as they lie in `folder`."""
    text = (shipped(PROCESSES) / f"{processes}.yaml").read_text(encoding="utf-8")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("# Run it from the rep"))
    text = _set(text, "num_processes", str(wish.num_processes))
    text = _set(text, "num_machines", str(wish.num_nodes))
    files = {}
    if not wish.num_gpus:
        text = _set(text, "use_cpu", "true")
    if named := re.search(r"deepspeed_config_file: (\S+)", text):
        name = Path(named[1]).name
        files[name] = (shipped(PROCESSES) / name).read_text(encoding="utf-8")
        text = _set(text, "deepspeed_config_file", str(folder / name))
    return {"accelerate.yaml": text, **files}


def _batch_script(out: Path, wish: Wish) -> str:
    """slurm/train.sbatch for this run, which takes nothing but settings to change."""
    script = (shipped(SCRIPTS) / "train.sbatch").read_text(encoding="utf-8")
    _, mark, rest = script.partition("#SBATCH ")
    head = [
        "#!/bin/bash",
        f"# sbatch {out / 'train.sbatch'} [key=value ...]     from this folder, beside slurm/",
        "# It comes back by itself after the time limit, a preemption, a crash: docs/slurm.md of gemma_dist.",
        "#",
    ]
    for given, value in (
        ("nodes=2", f"nodes={wish.num_nodes}"),
        ("gres=gpu:8", f"gres=gpu:{wish.num_gpus}"),
        ("cpus-per-task=96", f"cpus-per-task={CPUS_PER_GPU * max(1, wish.num_gpus)}"),
    ):
        if wish.num_gpus or not given.startswith("gres"):
            rest = rest.replace(f"#SBATCH --{given}\n", f"#SBATCH --{value}\n")
        else:
            rest = rest.replace(f"#SBATCH --{given}\n", "")
    rest = re.sub(r"(?m)^usage=.*\n", "", rest)
    rest = rest.replace("=${1:?$usage}", f"={shlex.quote(str(out / 'accelerate.yaml'))}")
    rest = rest.replace("=${2:?$usage}\nshift 2\n", f"={shlex.quote(str(out / 'recipe.yaml'))}\n")
    return "\n".join(head) + "\n" + mark + rest


def _other_scripts(out: Path) -> str:
    """What is there instead of the scripts that the batch script calls; "" where they are, or can be copied."""
    here = Path(SCRIPTS)
    if not here.exists():
        return ""
    absent = [name for name in CALLED if not (here / name).is_file()]
    others = [
        name
        for name in CALLED
        if name not in absent and (here / name).read_bytes() != (shipped(SCRIPTS) / name).read_bytes()
    ]
    found = [f"without {', '.join(absent)}"] * bool(absent) + [f"with another {', '.join(others)}"] * bool(others)
    if not found:
        return ""
    return (
        f"{here}/, {' and '.join(found)}; on Slurm {out / 'train.sbatch'} calls those that `gemma-dist recipes "
        f"{option('out')} FOLDER` copies"
    )


def _commands(out: Path, wish: Wish, processes: str, config: RunConfig, shards: str) -> list[str]:
    """What comes next."""
    quoted = {name: shlex.quote(str(out / name)) for name in ("recipe.yaml", "accelerate.yaml", "train.sbatch")}
    commands = []
    if shards != wish.data:
        longest = config.train.packing_length
        limit = f" {option('max_length')} {longest} {option('too_long')} cut_turns" if longest else ""
        model, into = shlex.quote(wish.model), f"{option('out')} {shlex.quote(shards)}"
        commands.append(f"gemma-dist shard {shlex.quote(wish.data)} --model {model}{limit} {into}")
    process_config = f"{option('accelerate_config')} {quoted['accelerate.yaml']}"
    commands.append(f"gemma-dist check {quoted['recipe.yaml']} {process_config}")
    if wish.gpu_memory is not None:
        commands.append(f"gemma-dist plan {quoted['recipe.yaml']} {process_config} --gpu-memory {wish.gpu_memory:g}GB")
    if processes == "single":
        return [*commands, f"gemma-dist train {quoted['recipe.yaml']}"]
    launch = f"accelerate launch --config_file {quoted['accelerate.yaml']}"
    if wish.num_nodes == 1:
        commands.append(f"{launch} -m gemma_dist train {quoted['recipe.yaml']}")
    return [*commands, f"sbatch {quoted['train.sbatch']}"]
