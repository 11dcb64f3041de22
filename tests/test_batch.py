"""Packs as rows of a batch: nothing lost, nothing mixed up, documents marked by positions that start again."""

import pytest
import torch

from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.model.vision import Patches
from gemma_dist.stream.collate import ControlIds, Sample, collate, collate_packs
from tests.support.documents import document

IDS = ControlIds(pad=0, begin_image=10, image=11, end_image=12, patches=Patches(num_values=768, pooling=3))
TEXT = document(IDS, 7)
SHORT = document(IDS, 4)
IMAGE = document(IDS, 3, "<", (2, 1), ">", 2)
TWO_IMAGES = document(IDS, 1, "<", (1, 1), ">", "<", (2, 2), ">")
FILLER = [IDS.begin_image, IDS.image, IDS.end_image]


def tokens(sample: Sample) -> list[int]:
    return sample.encoded.input_ids


def documents(batch: dict[str, torch.Tensor], row: int) -> list[list[int]]:
    """The token ids of a row, cut where its positions start again, after checking that they count up between."""
    cut: list[list[int]] = []
    for token, position in zip(batch["input_ids"][row].tolist(), batch["position_ids"][row].tolist(), strict=True):
        if position == 0:
            cut.append([])
        assert position == len(cut[-1])
        cut[-1].append(token)
    return cut


def test_a_pack_is_a_row_of_documents_padded_by_one_more() -> None:
    batch = collate_packs([[TEXT, IMAGE, SHORT], [TWO_IMAGES, TEXT]], IDS)
    names = ["input_ids", "labels", "position_ids", "mm_token_type_ids", "kinds", "pixel_values", "image_position_ids"]
    assert sorted(batch) == sorted(names), "and no attention_mask"
    assert all(batch[name].shape == (2, 20) and batch[name].dtype == torch.int64 for name in names[:4])
    assert documents(batch, 0) == [tokens(TEXT), tokens(IMAGE), tokens(SHORT)]
    assert documents(batch, 1) == [tokens(TWO_IMAGES), tokens(TEXT), [IDS.pad] * 3]
    labels = TWO_IMAGES.encoded.labels + TEXT.encoded.labels + [IGNORE_INDEX] * 3
    assert batch["labels"][1].tolist() == labels
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == IDS.image).long())
    assert torch.equal(batch["pixel_values"][:1, :18], IMAGE.pixels["pixel_values"])
    assert torch.equal(batch["pixel_values"][1:], TWO_IMAGES.pixels["pixel_values"])
    assert (batch["image_position_ids"][0, 18:] == -1).all()


@pytest.mark.parametrize(
    ("packs", "expected"),
    [
        ([[TEXT, SHORT]], [[tokens(TEXT), tokens(SHORT), FILLER]]),
        ([[TEXT, SHORT], [TEXT]], [[tokens(TEXT), tokens(SHORT)], [tokens(TEXT), FILLER, [IDS.pad]]]),
        ([[TEXT], []], [[tokens(TEXT)], [FILLER, [IDS.pad] * 4]]),
        ([[]], [[FILLER]]),
        ([], [[FILLER]]),
    ],
)
def test_without_an_image_the_filler_is_a_document_behind_the_shortest_row(
    packs: list[list[Sample]], expected: list[list[list[int]]]
) -> None:
    batch = collate_packs(packs, IDS)
    assert [documents(batch, row) for row in range(len(batch["input_ids"]))] == expected
    assert batch["pixel_values"].shape == (1, 9, 768)
    assert (batch["labels"] != IGNORE_INDEX).sum() == sum(s.encoded.num_target_tokens for pack in packs for s in pack)


def test_an_empty_pack_beside_images_is_padding_alone() -> None:
    batch = collate_packs([[], [IMAGE]], IDS)
    assert documents(batch, 0) == [[IDS.pad] * len(tokens(IMAGE))]
    assert len(batch["pixel_values"]) == 1


def test_packs_of_one_are_the_rows_of_collate() -> None:
    samples = [TEXT, IMAGE, TWO_IMAGES]
    rows, packs = collate(samples, IDS), collate_packs([[sample] for sample in samples], IDS)
    for name in rows.keys() & packs.keys():
        assert torch.equal(rows[name], packs[name]), name
    assert rows.keys() ^ packs.keys() == {"attention_mask", "position_ids"}


def test_a_trained_first_token_would_be_scored_on_the_document_before_it() -> None:
    trained = document(IDS, 3)
    trained.encoded.labels[0] = trained.encoded.input_ids[0]
    with pytest.raises(AssertionError, match="trains its first token"):
        collate_packs([[SHORT, trained]], IDS)
