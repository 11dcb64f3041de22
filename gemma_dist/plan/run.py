"""`gemma-dist plan`: whether a recipe fits a GPU, where its bytes go, and what would make it smaller.

plan = make_plan(load_config("launch/e4b_qlora_16gb.yaml"), Topology(""), gpu_memory=16)
plan.fits, plan.figure
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError
from gemma_dist.family import known_config
from gemma_dist.logs import write_json
from gemma_dist.plan.estimate import Estimate, estimate_memory
from gemma_dist.plan.geometry import read_geometry
from gemma_dist.plan.levers import Lever, changes
from gemma_dist.plan.margin import GIB, USABLE, Margin
from gemma_dist.plan.weights import placement
from gemma_dist.plan.workload import Workload, workload
from gemma_dist.recipe import load_config
from gemma_dist.topology import Topology, require_fit


@dataclass(frozen=True)
class Request:
    """What is asked of a plan beside the recipe."""

    gpu_memory: float | None = None  # GiB, as the card is sold; None: no verdict
    num_tokens: int | None = None  # of a micro-batch; None: as the recipe and its shards say
    num_images: int | None = None
    tokens_per_image: int | None = None
    simulate: bool = False


@dataclass(frozen=True)
class Plan:
    """A run's memory, against a GPU."""

    config: RunConfig
    topology: Topology
    work: Workload
    estimate: Estimate
    margin: Margin
    gpu_memory: float | None
    levers: tuple[Lever, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes of a GPU, the usual margin included."""
        return self.needed_at(1)

    def needed_at(self, which: int) -> int:
        """Bytes of a GPU with the least (0), the usual (1) or the largest (2) margin."""
        peak = self.estimate.peak_bytes
        return peak + self.margin.total(peak, self.topology.num_processes, which)

    @property
    def available(self) -> int | None:
        """Bytes that a card of that size gives; None where none was named."""
        return None if self.gpu_memory is None else int(self.gpu_memory * USABLE * GIB)

    @property
    def fits(self) -> bool | None:
        """Whether it fits with the usual margin; None where no GPU was named."""
        return None if self.available is None else self.needed <= self.available

    @property
    def is_tight(self) -> bool:
        """Whether the range of the margin leaves it open."""
        available = self.available
        return available is not None and self.needed_at(0) <= available < self.needed_at(2)

    @property
    def figure(self) -> str:
        """The one line that a recipe's comment repeats."""
        of = "" if self.gpu_memory is None else f" of {self.gpu_memory:g}"
        return f"plan: {self.needed / GIB:.1f} GiB{of}"


def make_plan(
    config: RunConfig, topology: Topology, margin: Margin | None = None, request: Request | None = None
) -> Plan:
    """The plan of a checked recipe on `topology`, without levers.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the batch does not divide among the ranks.
    """
    request = request or Request()
    geometry = read_geometry(config.model.model_name_or_path)
    work = workload(
        config,
        topology,
        num_tokens=request.num_tokens,
        num_images=request.num_images,
        tokens_per_image=request.tokens_per_image,
    )
    place = placement(config, has_images=work.has_images)
    estimate = estimate_memory(geometry, config, topology, work.batch, place)
    if request.simulate:
        estimate = _simulated(config, work, estimate)
    return Plan(config, topology, work, estimate, margin or Margin(), request.gpu_memory)


def plan_recipe(path: Path, overrides: Sequence[str], topology: Topology, margin: Margin, request: Request) -> Plan:
    """The plan of a recipe, with all that would make it smaller: each planned anew with that change.

    Raises:
        ConfigError: the recipe is wrong, or not compatible with `topology`.
        CheckpointError: there is no such model.
    """

    def planned(more: Sequence[str] = (), other: Topology = topology, *, simulate: bool = False) -> Plan:
        """The plan with some changes."""
        config = load_config(path, [*overrides, *more])
        require_fit(config, other)
        return make_plan(config, other, margin, dataclasses.replace(request, simulate=simulate))

    closed_form = planned()
    levers = _levers(closed_form, request, planned)
    plan = planned(simulate=True) if request.simulate else closed_form
    return dataclasses.replace(plan, levers=levers)


def _levers(plan: Plan, request: Request, planned: Callable[..., Plan]) -> tuple[Lever, ...]:
    """What saves memory, most first: the difference of two plans."""
    levers = []
    for change in changes(plan.config, plan.topology, plan.estimate.place, given_tokens=request.num_tokens is not None):
        try:
            other = planned(change.overrides, change.topology or plan.topology)
        except ConfigError:  # does not go together with the rest of the recipe
            continue
        saved = plan.needed - other.needed
        if saved >= 2**20:
            levers.append(Lever(change.words, saved, change.note, other.fits))
    return tuple(sorted(levers, key=lambda lever: -lever.num_bytes))


def _simulated(config: RunConfig, work: Workload, estimate: Estimate) -> Estimate:
    """The estimate with the activations of a simulated step."""
    from gemma_dist.plan.simulate import simulate

    batch = work.batch
    if batch.num_ranks > 1:
        raise ConfigError(
            f"gemma-dist plan --simulate runs a step of one process, and train.sequence_parallel_size is "
            f"{batch.num_ranks}; leave one of the two out"
        )
    with _config_at_hand(config) as config:
        result = simulate(
            config,
            num_tokens=batch.num_tokens,
            num_images=batch.num_images,
            tokens_per_image=batch.tokens_per_image,
        )
    return estimate.with_activations(result.parts, result.peak_bytes)


@contextlib.contextmanager
def _config_at_hand(config: RunConfig) -> Iterator[RunConfig]:
    """`config` with a folder that holds a config.json in the place of the name of one of Google's models, of which the
    simulator needs nothing else: so it works before a download."""
    name = config.model.model_name_or_path
    known = None if Path(name).is_dir() else known_config(name)
    if known is None:
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", known)
        model = config.model.model_copy(update={"model_name_or_path": folder})
        yield config.model_copy(update={"model": model})
