"""What the model was shown, for the page that people look at; no score hangs on it.

    OUT/trajectories.jsonl    one line a trajectory, in their order: its messages, of which a decision point saw those
                              before its turn; an image part names its image and its size in pixels
    OUT/images/NAME.jpg       each image once, small; NAME is the beginning of the hash of its file

Each rank keeps those of its own trajectories (`.trajectories-RANK.jsonl`), and rank 0 joins them when the run ends. A
run that goes on writes them again, so they are the same for any number of ranks.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.data.images import image_size, thumbnail
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.evaluate.page import IMAGES, TRAJECTORIES
from gemma_dist.files import writing
from gemma_dist.logs import JsonlWriter

LONGEST_SIDE = 640  # pixels of a kept image


def keep_shown(out: Path, trajectories: Mapping[int, Trajectory]) -> None:
    """Keep this rank's trajectories, by their numbers, as the model sees them."""
    writer = JsonlWriter(out / f".trajectories-{world.rank()}.jsonl", append=False)
    for number, trajectory in trajectories.items():
        images = iter([_keep_image(out / IMAGES, image) for image in trajectory.images])
        messages = [_with_images(dict(message), images) for message in trajectory.messages]
        writer.write({"trajectory": number, "id": trajectory.id, "messages": messages})
    writer.close()


def _with_images(message: dict[str, Any], images: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The message, its image parts with what `images` yields next."""
    if isinstance(message["content"], list):
        message["content"] = [
            {**part, **next(images)} if part["type"] == "image" else part for part in message["content"]
        ]
    return message


def _keep_image(folder: Path, data: bytes) -> dict[str, Any]:
    """Keep an image small, unless it is there; its name, and its size as the model gets it."""
    name = hashlib.sha256(data).hexdigest()[:16]
    height, width = image_size(data)
    path = folder / f"{name}.jpg"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with writing(path) as temporary:
            temporary.write_bytes(thumbnail(data, LONGEST_SIDE))
    return {"image": name, "width": width, "height": height}


def join_shown(out: Path) -> None:
    """Make one file of what the ranks kept."""
    parts = sorted(path for path in out.iterdir() if re.fullmatch(r"\.trajectories-\d+\.jsonl", path.name))
    lines: dict[int, bytes] = {}
    for part in parts:  # also those of a start on more ranks, whose last line a kill may have torn
        for raw in part.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                lines[json.loads(raw)["trajectory"]] = raw
    with writing(out / TRAJECTORIES) as temporary, temporary.open("wb") as file:
        file.writelines(lines[number] + b"\n" for number in sorted(lines))
    for part in parts:
        part.unlink()


def copy_shown(run: Path, out: Path) -> None:
    """Copy what a run's model was shown, where that was kept, to another folder."""
    if not (run / TRAJECTORIES).is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    with writing(out / TRAJECTORIES) as temporary:
        shutil.copyfile(run / TRAJECTORIES, temporary)
    if (run / IMAGES).is_dir():
        shutil.copytree(run / IMAGES, out / IMAGES, dirs_exist_ok=True)
