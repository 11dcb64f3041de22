"""Rows with the images of other rows: as many, all others than their own, and the same on every rank."""

import pytest

from gemma_dist.data.trajectory import Trajectory
from gemma_dist.errors import DataError
from gemma_dist.evaluate.images import swap_images


def rows(*images: list[bytes]) -> list[Trajectory]:
    return [Trajectory(f"row-{number}", [], [], each) for number, each in enumerate(images)]


@pytest.mark.parametrize(
    ("images", "swapped"),
    [
        ([[b"a"], [b"b"], [], [b"c"]], [[b"b"], [b"c"], [], [b"a"]]),
        ([[b"a"], [b"a"], [b"b"]], [[b"b"], [b"b"], [b"a"]]),  # not its own again
        ([[b"a"], [b"c", b"d"], [b"e", b"f"]], [[b"c"], [b"e", b"f"], [b"c", b"d"]]),  # none has as many as the first
        ([[b"a", b"b", b"c"], [b"d"]], [[b"d", b"d", b"d"], [b"a"]]),
    ],
)
def test_each_row_gets_images_of_another(images: list[list[bytes]], swapped: list[list[bytes]]) -> None:
    found = list(swap_images(rows(*images)))
    assert [row.images for row in found] == swapped
    assert [row.id for row in found] == [f"row-{number}" for number in range(len(images))]


@pytest.mark.parametrize("images", [[[b"a"], []], [[b"a"], [b"a"]]])
def test_an_image_without_another_is_refused(images: list[list[bytes]]) -> None:
    with pytest.raises(DataError, match="row-0: no other row has an image to swap with; use images: blank"):
        list(swap_images(rows(*images)))
