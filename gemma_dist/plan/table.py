"""The planned figures in docs/memory.md and in the recipes' comments: `python -m gemma_dist.plan.table`, run from the
repository's root, writes them, and a test holds them.

A recipe's comment has one line for the GPUs that it is meant for, the only one that is written anew:

    # plan: 12.3 GiB of 16
    # plan: 14.0 GiB of 80 on 8 GPUs, accelerate_configs/zero3.yaml
"""

import re
from pathlib import Path

from gemma_dist.family import SIZES, hub_name
from gemma_dist.plan.geometry import embeddings, linears, read_geometry, stacks, vectors
from gemma_dist.plan.margin import GIB, Margin
from gemma_dist.plan.run import Plan, Request, make_plan
from gemma_dist.recipe import load_config
from gemma_dist.topology import Topology, planned_topology

PAGE, RECIPES = Path("docs/memory.md"), Path("launch")
BEGIN, END = "<!-- begin: python -m gemma_dist.plan.table -->", "<!-- end -->"
RECIPE_OF_TABLE = RECIPES / "e4b_qlora_16gb.yaml"
LENGTHS, IMAGES = (2048, 4096, 8192), (0, 1, 8)
NO_SHARDS = "data.train=no/shards"  # so that a figure does not depend on what lies about
LINE = re.compile(
    r"^# plan: \S+ GiB of (?P<memory>\d+)(?: on (?P<num>\d+) GPUs, (?P<config>\S+\.yaml))?$", re.MULTILINE
)


def recipe_line(path: Path) -> str | None:
    """The line of a recipe's comment as it should be; None where the recipe has none.

    Raises:
        ConfigError: the recipe or its accelerate config is wrong.
    """
    found = LINE.search(path.read_text(encoding="utf-8"))
    if found is None:
        return None
    launch = found["config"]
    topology = planned_topology(Path(launch), int(found["num"])) if launch else Topology("")
    config = load_config(path, [NO_SHARDS])
    plan = make_plan(config, topology, Margin(), Request(gpu_memory=float(found["memory"]), num_images=0))
    return f"# {plan.figure}" + (f" on {found['num']} GPUs, {launch}" if launch else "")


def memory_tables() -> str:
    """Markdown: the size of each model, and what it needs by tokens and images of a micro-batch, for QLoRA and LoRA."""
    tables = [_downloads()]
    for tuning, title in (("qlora", "QLoRA, base in 4 bits"), ("lora", "LoRA, base in bfloat16")):
        columns = [(length, images) for length in LENGTHS for images in IMAGES]
        header = " | ".join(f"{length:,}, {images} image{'' if images == 1 else 's'}" for length, images in columns)
        rows = [f"| {title} | {header} |", "|---|" + "---:|" * len(columns)]
        for size in SIZES:
            cells = [_cell(size, tuning, length, images) for length, images in columns]
            rows.append(f"| {size} | {' | '.join(cells)} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def _downloads() -> str:
    """Markdown: what each model takes of a disk as the hub has it, in bfloat16."""
    rows = ["| model | weights, billions | download, GB |", "|---|---:|---:|"]
    for size in SIZES:
        geometry = read_geometry(hub_name(size))
        num_weights = sum(linear.inputs * linear.outputs for linear in linears(geometry))
        num_weights += sum(stack.numel for stack in stacks(geometry))
        num_weights += sum(embeddings(geometry).values()) + sum(vectors(geometry).values())
        rows.append(f"| {hub_name(size)} | {num_weights / 1e9:.1f} | {2 * num_weights / 1e9:.1f} |")
    return "\n".join(rows)


def _cell(size: str, tuning: str, length: int, images: int) -> str:
    """GiB of a GPU, the usual margin included."""
    if images * 280 > length:
        return "–"
    return f"{_plan(size, tuning, length, images).needed / GIB:.1f}"


def _plan(size: str, tuning: str, length: int, images: int) -> Plan:
    """One cell: the recipe of E4B with another model and length."""
    overrides = [f"model_name_or_path={hub_name(size)}", f"packing_length={length}", f"tuning={tuning}", NO_SHARDS]
    if tuning == "lora":
        overrides.append("quantization=null")
    return make_plan(load_config(RECIPE_OF_TABLE, overrides), Topology(""), Margin(), Request(num_images=images))


def with_tables(page: str) -> str:
    """The Markdown `page` with the tables as they are now between BEGIN and END."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{memory_tables()}\n\n{END}{after}"


def main() -> None:
    """Write all of them anew."""
    for path in sorted(RECIPES.glob("*.yaml")):
        if line := recipe_line(path):
            text = path.read_text(encoding="utf-8")
            path.write_text(LINE.sub(line, text, count=1), encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
