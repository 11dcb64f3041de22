"""Documents made by hand, with random words and pictures where a test wants them."""

import torch

from gemma_dist.data.encode import IGNORE_INDEX, Encoded
from gemma_dist.stream.collate import ControlIds, Sample

FIRST_WORD, NUM_WORDS = 40, 200  # ids of a tiny tokenizer that are no control tokens
Picture = tuple[int, int]  # width and height in soft tokens


def document(ids: ControlIds, *parts: int | Picture | str) -> Sample:
    """A sample of so many random words, pictures (bare soft tokens) and control tokens ("<" and ">" around a picture).

    Every word but the first token is trained. The same parts give the same sample.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, repr(parts))))
    input_ids: list[int] = []
    pictures = [part for part in parts if isinstance(part, tuple)]
    for part in parts:
        if isinstance(part, int):
            input_ids += torch.randint(FIRST_WORD, FIRST_WORD + NUM_WORDS, (part,), generator=generator).tolist()
        elif isinstance(part, tuple):
            input_ids += [ids.image] * (part[0] * part[1])
        else:
            input_ids.append({"<": ids.begin_image, ">": ids.end_image}[part])
    labels = [token if i and token >= FIRST_WORD else IGNORE_INDEX for i, token in enumerate(input_ids)]
    types = [int(token == ids.image) for token in input_ids]
    encoded = Encoded(input_ids, labels, types, num_images=len(pictures), num_dropped_reasoning=0)
    return Sample(repr(parts), encoded, pixels(pictures, generator) if pictures else {})


def pixels(pictures: list[Picture], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random patches, 3 x 3 for each soft token, padded to the largest picture as the image processor pads."""
    num_patches = max(9 * width * height for width, height in pictures)
    values = torch.zeros(len(pictures), num_patches, 768)
    positions = torch.full((len(pictures), num_patches, 2), -1)
    for i, (width, height) in enumerate(pictures):
        grid = torch.cartesian_prod(torch.arange(3 * height), torch.arange(3 * width)).flip(-1)
        positions[i, : len(grid)] = grid
        values[i, : len(grid)] = torch.rand(len(grid), 768, generator=generator)
    return {"pixel_values": values, "image_position_ids": positions}
