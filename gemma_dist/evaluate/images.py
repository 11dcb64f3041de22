"""Rows whose images say nothing, or something else: what is right without the image does not come from it."""

import io
import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace

from PIL import Image

from gemma_dist.data.images import decode_image
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.errors import DataError


def blank(image: bytes) -> bytes:
    """An empty white page of the same size: what is left to a model that does not look."""
    size = decode_image(image).size
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, format="PNG")
    return buffer.getvalue()


def swap_images(rows: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """The rows, each with the images of another one: the next in a circle that has as many, all others than its own.
    Where none has as many, they come one by one from the rows behind it.

    Holds all rows at once, images included.

    Raises:
        DataError: only one image is there.
    """
    rows = list(rows)
    for number, row in enumerate(rows):
        others = rows[number + 1 :] + rows[:number]
        yield replace(row, images=_others(row, others)) if row.images else row


def _others(row: Trajectory, others: list[Trajectory]) -> list[bytes]:
    """As many images as the row has, from `others`; each differs from the one whose place it takes."""
    for other in others:
        if len(other.images) == len(row.images) and all(map(operator.ne, other.images, row.images)):
            return other.images
    pool = [image for other in others for image in other.images]
    taken = []
    for own in row.images:
        place = next((place for place, image in enumerate(pool) if image != own), None)
        if place is None:
            raise DataError(f"{row.id}: no other row has an image to swap with; use images: blank")
        taken.append(pool[place])
        pool = pool[place + 1 :] + pool[: place + 1]
    return taken
