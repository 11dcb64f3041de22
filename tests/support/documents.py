"""Documents made by hand, with random words and images where a test wants them."""

import torch
from torch.nn.functional import pad

from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.model.vision import Patches
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
    encoded = Encoded.of_words(input_ids, labels, types, len(images))
    return Sample(repr(parts), encoded, pixels(ids.patches, images, generator) if images else {})


def pixels(patches: Patches, images: list[Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random colors, padded to the largest image as the image processor pads."""
    most = max(patches.num_patches(width * height) for width, height in images)
    padded: dict[str, list[torch.Tensor]] = {"pixel_values": [], "image_position_ids": []}
    for width, height in images:
        colors = torch.rand(patches.num_patches(width * height), patches.num_values, generator=generator)
        for name, tensor in patches.image(width, height, colors).items():
            missing = most - tensor.shape[1]
            padded[name].append(pad(tensor, (0, 0, 0, missing), value=0 if name == "pixel_values" else -1))
    return {name: torch.cat(tensors) for name, tensors in padded.items()}
