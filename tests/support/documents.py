"""Documents made by hand, with random words and images where a test wants them."""

import torch

from gemma_dist.data.encode import IGNORE_INDEX, Encoded
from gemma_dist.stream.collate import ControlIds, Sample

FIRST_WORD, NUM_WORDS = 40, 200  # ids of a tiny tokenizer that are no control tokens
Size = tuple[int, int]  # of an image: width and height in soft tokens


def document(ids: ControlIds, *parts: int | Size | str) -> Sample:
    """A sample of so many random words, images (bare soft tokens) and control tokens ("<" and ">" around an image).

    Every word but the first token is trained. The same parts give the same sample.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, repr(parts))))
    input_ids: list[int] = []
    images = [part for part in parts if isinstance(part, tuple)]
    for part in parts:
        if isinstance(part, int):
            input_ids += torch.randint(FIRST_WORD, FIRST_WORD + NUM_WORDS, (part,), generator=generator).tolist()
        elif isinstance(part, tuple):
            input_ids += [ids.image] * (part[0] * part[1])
        else:
            input_ids.append({"<": ids.begin_image, ">": ids.end_image}[part])
    labels = [token if i and token >= FIRST_WORD else IGNORE_INDEX for i, token in enumerate(input_ids)]
    types = [int(token == ids.image) for token in input_ids]
    encoded = Encoded(input_ids, labels, types, num_images=len(images), num_dropped_reasoning=0)
    return Sample(repr(parts), encoded, pixels(images, generator) if images else {})


def pixels(images: list[Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random patches, 3 x 3 for each soft token, padded to the largest image as the image processor pads."""
    num_patches = max(9 * width * height for width, height in images)
    values = torch.zeros(len(images), num_patches, 768)
    positions = torch.full((len(images), num_patches, 2), -1)
    for i, (width, height) in enumerate(images):
        grid = torch.cartesian_prod(torch.arange(3 * height), torch.arange(3 * width)).flip(-1)
        positions[i, : len(grid)] = grid
        values[i, : len(grid)] = torch.rand(len(grid), 768, generator=generator)
    return {"pixel_values": values, "image_position_ids": positions}
