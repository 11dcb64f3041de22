"""The cells of the matrix: which launch trains what, how, and what it is compared with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from gemma_dist.fsdp_config import OPTIMIZERS as FSDP_OPTIMIZERS
from gemma_dist.resolve import FOLLOWING_ELEMENTS
from gemma_dist.topology import TESTED_OPTIMIZERS

LAUNCHES = {  # number of processes; the rest is in accelerate_configs/
    "single": 1,
    "cpu_ddp": 2,
    "cpu_zero1": 2,
    "cpu_zero2": 2,
    "cpu_zero3": 2,
    "cpu_zero3_offload": 2,
    "cpu_fsdp2": 2,
    "cpu_ddp x4": 4,
    "cpu_zero3 x4": 4,
}
UP_TO_TWO = tuple(launch for launch, num_processes in LAUNCHES.items() if num_processes <= 2)
TUNINGS = {  # recipe in launch/, and overrides
    "full": ("cpu_full", []),
    "lora": ("cpu_lora", []),
    "dora": ("cpu_lora", ["lora.use_rslora=true", "lora.use_dora=true"]),
    "qlora": ("cpu_qlora", []),
    "experts": ("cpu_lora", ["lora.target_parameters=[experts.gate_up_proj, experts.down_proj]"]),  # 26b alone has some
    "qlora-experts": ("cpu_qlora", ["lora.target_parameters=[experts.gate_up_proj, experts.down_proj]"]),
    "qlora-host": ("cpu_qlora", ["model.experts=host"]),
}
FOR_ALL_STYLES = ("full", "lora", "dora", "qlora")
STYLES = ("e4b", "31b", "26b", "12b", "e2b")
DATA = ("text", "images", "some", "empty")  # images in none, all, some rows; "empty": a rank's batch is all quarantined
WEIGHTED = "weighted"  # images in some, and rows with weights
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd")
# Plain SFTTrainer; and the same with `model.accepts_loss_kwargs = True`: transformers' Gemma 4 has it False, and
# TRL's loss is then not weighted by target tokens.
PEERS = ("trl", "trl-token-weighted")
ELSEWHERE = {  # the launch, of another world size or optimizer, that resumes from a checkpoint of this one
    "single": "cpu_zero3",
    "cpu_ddp": "cpu_zero3_offload",  # where DeepSpeed's CPU Adam steps
    "cpu_zero1": "cpu_zero3 x4",
    "cpu_zero2": "single",
    "cpu_zero3": "cpu_ddp x4",
    "cpu_zero3_offload": "cpu_fsdp2",
    "cpu_fsdp2": "single",
    "cpu_ddp x4": "cpu_zero2",
    "cpu_zero3 x4": "cpu_zero1",
}
OPTIONS = tuple(product((False, True), (False, True), (1, 4)))  # packing, checkpointing, accumulation
GLOBAL_BATCH = 8
LIMITS = {"float32": 1e-5, "bfloat16": 5e-2}
# Of steps 2 to 5 with experts, or with 8-bit states of the optimizer: which expert a token goes to and which of 256
# levels a state gets are step functions, and where two are nearly equal, a difference in the eighth digit decides.
ROUNDED_LIMIT = 1e-3


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    launch: str
    tuning: str
    style: str
    data: str
    packing: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "float32"
    optim: str = "adamw_torch"
    ple: str = "auto"  # where per-layer embeddings are: beside an adapter on the host, in references on the GPU
    sequence: int = 1  # train.sequence_parallel_size
    resumed_from: str = ""  # the launch whose checkpoint of step 2 it resumes from
    resumed_sequence: int = 1  # and its train.sequence_parallel_size
    is_reference: bool = False
    peer: str = ""  # one of PEERS: trained by plain TRL instead

    @property
    def name(self) -> str:
        """Of the cell and its folder: what differs from the defaults, in words."""
        words = [self.launch, self.tuning, self.style, self.data]
        if self.packing:
            words.append("packed")
        if self.checkpointing:
            words.append("checkpointed")
        if self.accumulation > 1:
            words.append(f"accumulated{self.accumulation}")
        if self.dtype == "bfloat16":
            words.append("bfloat16")
        if self.optim != "adamw_torch":
            words.append(self.optim)
        if self.ple != "auto":
            words.append(f"ple-{self.ple}")
        if self.sequence > 1:
            words.append(f"sequence{self.sequence}")
        if self.resumed_from:
            words.append(f"resumed-{self.resumed_from}")
            words += [f"sequence{self.resumed_sequence}"] if self.resumed_sequence > 1 else []
        if self.peer:
            words.append(self.peer)
        if self.is_reference:
            words.append("reference")
        return file_name("-".join(words))

    @property
    def reference(self) -> "Cell":
        """One process, float32, all trajectories of a step as rows of one batch; packs only say which these are."""
        return Cell(
            "single",
            self.tuning.removesuffix("-host"),
            self.style,
            self.data,
            packing=self.packing,
            dtype=self.dtype,
            optim=self.optim,
            is_reference=True,
            peer=self.peer,
        )

    @property
    def in_4_bits(self) -> bool:
        """Whether the base is, its experts included."""
        return self.tuning.startswith("qlora")

    @property
    def whole(self) -> "Cell":
        """The uninterrupted run of a resumed one."""
        return replace(
            self, launch=self.resumed_from, sequence=self.resumed_sequence, resumed_from="", resumed_sequence=1
        )

    @property
    def stays(self) -> bool:
        """Whether it resumes in the launch that it began in."""
        return (self.launch, self.sequence) == (self.resumed_from, self.resumed_sequence)

    @property
    def data_world_size(self) -> int:
        """Ranks, or groups of them, that have sequences of their own."""
        return LAUNCHES[self.launch] // self.sequence

    @property
    def later_limit(self) -> float:
        """For the losses of the steps after the first."""
        limit = LIMITS[self.dtype]
        rounded = self.style == "26b" or self.optim == "adamw_8bit"
        return max(limit, ROUNDED_LIMIT) if rounded else limit


def file_name(launch: str) -> str:
    """A launch as it is written in names of files."""
    return launch.replace(" ", "-")


def all_cells() -> list[Cell]:
    """Every launch x tuning x style x data (with four processes, and for e2b, which is much like e4b: only data with
    images in some rows), the options dealt so that each meets each of the others; bfloat16; the other optimizers; and
    every launch resumed in itself and in another."""
    cells = []
    kinds = [*product(LAUNCHES, FOR_ALL_STYLES, STYLES[:-1], DATA), *product(LAUNCHES, ["experts"], ["26b"], DATA)]
    kinds += product(UP_TO_TWO, FOR_ALL_STYLES, ["e2b"], ["some"])
    for i, (launch, tuning, style, data) in enumerate(kinds):
        packing, checkpointing, accumulation = OPTIONS[(i + i // len(OPTIONS)) % len(OPTIONS)]
        if data == "some" or launch in UP_TO_TWO:
            cells.append(_dealt(Cell(launch, tuning, style, data, packing, checkpointing, accumulation)))
    for launch, tuning in product(UP_TO_TWO, ("qlora-experts", "qlora-host")):
        cells.append(Cell(launch, tuning, "26b", "some", checkpointing=launch != "cpu_zero1"))
    for launch, tuning in product(UP_TO_TWO, FOR_ALL_STYLES):
        if tuning != "full" or "zero" in launch or "fsdp2" in launch:  # the others are refused
            cells.append(Cell(launch, tuning, "e4b", "some", dtype="bfloat16"))
    cells += [Cell(launch, "qlora", "12b", "some", dtype="bfloat16") for launch in UP_TO_TWO]
    for launch, optim in product(UP_TO_TWO, OPTIMIZERS):
        if _takes(launch, optim):
            cells.append(Cell(launch, "full", "31b", "some", optim=optim))

    resumed = [cell for cell in cells if cell.style == "e4b" and cell.data == "some" and cell.dtype == "float32"]
    resumed += [cell for cell in cells if cell.optim != "adamw_torch" and cell.launch in ("cpu_ddp", "cpu_zero2")]
    resumed += [cell for cell in cells if cell.tuning == "experts" and cell.data == "some"]
    return [*cells, *_resumed(resumed, ELSEWHERE), *_sharing_sequences(), *_weighted()]


def _sharing_sequences() -> Iterator[Cell]:
    """Launches whose ranks share sequences, two to each; resumed as they are, and from and in runs that share none."""
    launches = ("cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_ddp x4")
    for i, (launch, tuning, style) in enumerate(product(launches, ("full", "lora", "qlora"), STYLES[:-1])):
        _, checkpointing, accumulation = OPTIONS[(i + i // len(OPTIONS)) % len(OPTIONS)]
        data = ("some", "images", "empty")[(i + i // 3) % 3]
        yield _dealt(Cell(launch, tuning, style, data, True, checkpointing, accumulation, sequence=2))
    for launch in launches:
        shared = Cell(launch, "full", "31b", "some", packing=True, checkpointing=True, sequence=2)
        yield replace(shared, resumed_from=launch, resumed_sequence=2)
        yield replace(shared, resumed_from=launch)
        yield replace(shared, sequence=1, resumed_from=launch, resumed_sequence=2)
    yield Cell("cpu_fsdp2", "lora", "e4b", "some", packing=True, checkpointing=True, accumulation=2, sequence=2)
    yield Cell("cpu_fsdp2", "full", "31b", "some", packing=True, accumulation=2, sequence=2)
    yield Cell("cpu_ddp", "qlora-host", "26b", "some", packing=True, checkpointing=True, sequence=2)


def _weighted() -> Iterator[Cell]:
    """Rows with weights of their own, under every launch: as rows and as packs, and shared among ranks."""
    for launch, packing in product(LAUNCHES, (False, True)):
        yield _dealt(Cell(launch, "full", "e4b", WEIGHTED, packing, accumulation=2))
    for launch in ("cpu_ddp", "cpu_zero3", "cpu_fsdp2"):
        yield Cell(launch, "lora", "e4b", WEIGHTED, packing=True, checkpointing=True, sequence=2)


def pruned_cells() -> list[Cell]:
    """Every launch with two of the tunings; style and data (four pairs, so that cells share references) and options
    rotate. Four processes once for each launch of them."""
    kinds = (("e4b", "some", True), ("31b", "images", False), ("26b", "empty", False), ("e2b", "text", False))
    cells = []
    for i, (launch, tuning) in enumerate(product(UP_TO_TWO, FOR_ALL_STYLES)):
        if (i + i // 4) % 2:
            continue
        style, data, packing = kinds[(i // 2 + i // 4) % len(kinds)]
        checkpointing, accumulation = ((False, 4), (True, 1), (True, 4), (False, 1))[(i + i // 8) % 4]
        if (launch, tuning) == ("cpu_zero3", "dora"):
            checkpointing = True  # recomputed at ZeRO-3, DoRA looks into other layers
        cells.append(_dealt(Cell(launch, tuning, style, data, packing, checkpointing, accumulation)))
    resumed = [cell for cell in cells if cell.tuning in ("full", "lora") or cell.launch == "cpu_zero3"]
    # Resumed, too: the sum of two numbers does not depend on their order, that of four does.
    four = Cell("cpu_ddp x4", "full", "e4b", "some", packing=True)
    resumed.append(four)
    cells += [four, Cell("cpu_zero3 x4", "lora", "31b", "images")]
    cells.append(Cell("cpu_zero3", "experts", "26b", "empty", checkpointing=True))
    cells.append(Cell("cpu_ddp", "qlora-experts", "26b", "empty", checkpointing=True))
    cells.append(Cell("cpu_zero2", "qlora-host", "26b", "empty"))
    cells.append(Cell("single", "lora", "12b", "some", packing=True))
    cells.append(Cell("cpu_zero3", "full", "12b", "images"))
    for launch in ("cpu_ddp", "cpu_zero2", "cpu_zero3"):
        cells.append(Cell(launch, "lora", "e4b", "some", dtype="bfloat16"))
    cells += [Cell(launch, "full", "e4b", WEIGHTED, accumulation=2) for launch in ("cpu_ddp", "cpu_zero2")]
    cells.append(Cell("cpu_ddp x4", "full", "e4b", "some", packing=True, accumulation=4, sequence=2))
    cells.append(Cell("cpu_zero3", "lora", "12b", "some", packing=True, checkpointing=True, sequence=2))
    staying = ("cpu_zero1", "cpu_zero3", "cpu_zero3_offload", "cpu_ddp x4")
    return [*cells, *_resumed(resumed, ELSEWHERE | dict.fromkeys(staying))]


def core_cells() -> list[Cell]:
    """Of the pruned ones, what `make test` trains: on up to two processes, each launch and tuning (in 4 bits once),
    sequences that ranks share, and both kinds of resuming."""
    cells: list[Cell] = []
    seen: set[tuple[str, object]] = set()
    for cell in pruned_cells():
        resumed = cell.resumed_from and ("in itself" if cell.stays else "in another")
        tuning = "qlora" if cell.in_4_bits else cell.tuning
        columns = {("launch", cell.launch), ("tuning", tuning), ("sequence", cell.sequence), ("resumed", resumed)}
        if cell.launch in UP_TO_TWO and cell.resumed_from in ("", *UP_TO_TWO) and not columns <= seen:
            cells.append(cell)
            seen |= columns
    return cells


def peer_cells(peer: str) -> list[Cell]:
    """What TRL can be asked for: it has no quarantine, its packs would make other steps, and it saves what it likes.
    The cells with images show what it says to those of a tool's message that come in the column `images`."""
    cells = []
    for i, (launch, tuning) in enumerate(product(UP_TO_TWO, FOR_ALL_STYLES)):
        checkpointing, accumulation = ((False, 1), (True, 1), (False, 4), (True, 4))[(i + i // 4) % 4]
        cells.append(_dealt(Cell(launch, tuning, "e4b", "text", False, checkpointing, accumulation, peer=peer)))
    return [*cells, *(Cell(launch, "lora", "e4b", "some", peer=peer) for launch in UP_TO_TWO)]


def _takes(launch: str, optim: str) -> bool:
    """Whether a launch trains with an optimizer. The others are refused: they would see flat slices, or DeepSpeed's CPU
    Adam would step in their place."""
    if launch == "cpu_zero3_offload" and optim not in TESTED_OPTIMIZERS:
        return False
    return optim in {"zero": FOLLOWING_ELEMENTS, "fsdp": FSDP_OPTIMIZERS}.get(launch[4:8], OPTIMIZERS)


def _dealt(cell: Cell) -> Cell:
    """With no more accumulation than a rank has sequences of a step."""
    return replace(cell, accumulation=min(cell.accumulation, GLOBAL_BATCH // cell.data_world_size))


def _resumed(cells: Iterable[Cell], elsewhere: Mapping[str, str | None]) -> Iterator[Cell]:
    """Each of `cells` resumed in its own launch, and in the one that `elsewhere` names for it."""
    for cell in cells:
        yield replace(cell, resumed_from=cell.launch, resumed_sequence=cell.sequence)
        other = elsewhere[cell.launch]
        if other and (cell.optim not in OPTIMIZERS or _takes(other, cell.optim)):
            yield replace(cell, launch=other, resumed_from=cell.launch)
