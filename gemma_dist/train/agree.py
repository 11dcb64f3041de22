"""All ranks carry out the same run: what each was started with is compared before a model is loaded.

Every machine has a command of its own, typed or copied. With another learning rate on one of them the ranks would
compute together and each learn something else, without an error.
"""

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import gemma_dist
from gemma_dist import world
from gemma_dist.errors import ConfigError
from gemma_dist.health.facts import versions
from gemma_dist.logs import log
from gemma_dist.resolve import Run
from gemma_dist.train.checkpoint import flat

# Places, which each machine may have elsewhere: the identity says what is there, and `require_shared` that the run's
# folder is one.
PLACES = (
    "model.model_name_or_path",
    "data.train",
    "data.eval",
    "data.chat_template",
    "data.quarantine",
    "data.cache_dir",
    "data.cache_gb",
    "train.output_dir",
)
Facts = Mapping[str, object]


def require_same_run(run: Run) -> None:
    """Raises ConfigError on every rank, of which all call it, unless all were started with the same settings, corpus,
    base and launch; rank 0 warns of other versions."""
    hosts = world.gather_objects(socket.gethostname())
    if problems := differences(world.gather_objects(facts_of(run)), hosts):
        raise ConfigError(
            "the ranks were not started alike, and each would learn something else; start every machine with the same "
            "command and files, but its own machine rank:\n" + "\n".join(problems)
        )
    of_ranks = world.gather_objects(versions_here())
    if world.rank() == 0 and (problems := differences(of_ranks, hosts)):
        log.warning("versions differ, so results may: %s", "; ".join(problems))


def facts_of(run: Run) -> dict[str, object]:
    """All that has to be the same on every rank, by dotted keys."""
    settings = {key: value for key, value in flat(run.config.to_json()).items() if key not in PLACES}
    launch = {
        "kind": run.topology.distributed_type,
        "precision": run.topology.mixed_precision,
        "deepspeed": run.topology.deepspeed or {},
        "fsdp": run.topology.fsdp or {},
    }
    identity = {run.identity.meaning(name): value for name, value in run.identity.to_json().items()}
    quarantine = hashlib.sha256(json.dumps(sorted(run.schedule.quarantine)).encode()).hexdigest()[:12]
    held_out = None if run.held_out is None else run.held_out.shards.manifest_hash
    return {
        **settings,
        **flat(launch, "the launch's "),
        **identity,
        "data.quarantine (hash of its samples)": quarantine,
        "data.eval (manifest)": held_out,
    }


def versions_here() -> dict[str, object]:
    """Of what computes on this machine."""
    code = hashlib.sha256()
    package = Path(gemma_dist.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    # torch: with +cpu or +cu130, which the metadata leave out
    return {**versions(), "torch": torch.__version__, "gemma_dist's code (hash)": code.hexdigest()[:12]}


def differences(facts: Sequence[Facts], hosts: Sequence[str]) -> list[str]:
    """What is not the same in the facts of all ranks, in words."""
    problems = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        ranks_of: dict[str, list[int]] = {}  # by the value, as JSON
        for rank, of_rank in enumerate(facts):
            ranks_of.setdefault(json.dumps(of_rank.get(name), sort_keys=True, default=str), []).append(rank)
        if len(ranks_of) > 1:
            told = [f"{value} on {_places(ranks, hosts)}" for value, ranks in ranks_of.items()]
            problems.append(f"{name} is {', '.join(told)}")
    return problems


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 2, 3 (node7)`."""
    names = dict.fromkeys(hosts[rank] for rank in ranks)
    return f"rank {', '.join(map(str, ranks))} ({', '.join(names)})"
