"""Shards: whole or absent, the same bytes for the same input, and no damaged byte is ever read."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EncodingConfig, ShardConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.fit import cut_points
from gemma_dist.data.unroll import first_messages
from gemma_dist.errors import DataError
from gemma_dist.shards import manifest as manifest_module
from gemma_dist.shards import reader as shards_module
from gemma_dist.shards import sharding as module
from gemma_dist.shards.manifest import read_manifest
from gemma_dist.shards.reader import load_trajectories, open_shards
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import answer, call, picture, row, shard_rows, write_rows

ROWS = [row(number) for number in range(12)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a row group, a few row groups a shard."""
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 2000)
    monkeypatch.setattr(module, "SHARD_BYTES", 5000)


def test_what_is_sharded_is_read_back(tmp_path: Path, model: str, small_pieces: None) -> None:
    report = shard_rows(tmp_path, model, ROWS)
    shards = open_shards(tmp_path / "shards")
    raw = list(load_trajectories(tmp_path / "rows.jsonl", ShardConfig()))
    assert [shards.read(index) for index in range(len(shards))] == raw
    assert list(load_trajectories(tmp_path / "shards", ShardConfig())) == raw
    assert raw[3].images == [picture(300)]
    assert report.num_read == report.num_written == len(shards) == 12
    assert report.num_shards > 1


def test_the_manifest_holds_the_lengths_that_the_encoder_gives(tmp_path: Path, model: str) -> None:
    report = shard_rows(tmp_path, model, ROWS)
    shards = open_shards(tmp_path / "shards")
    encoder = load_encoder(model, EncodingConfig())
    encoded = [encoder.encode(shards.read(index)) for index in range(len(shards))]
    lengths = shards.num_text_tokens + shards.num_image_tokens
    assert lengths.tolist() == [len(sample.input_ids) for sample in encoded]
    assert shards.num_target_tokens.tolist() == [sample.num_target_tokens for sample in encoded]
    assert shards.num_images.tolist() == [1, 0, 0] * 4
    assert shards.fingerprint == encoder.fingerprint
    assert report.num_target_tokens == shards.num_target_tokens.sum()
    assert not shards.num_text_tokens.flags.owndata, "the columns lie in the mapped file"


@pytest.mark.parametrize("how", ["data_files", "data_dir"])
def test_plain_datasets_reads_the_shards(tmp_path: Path, model: str, small_pieces: None, how: str) -> None:
    from datasets import Image, Json, List, Value, load_dataset

    shard_rows(tmp_path, model, [*ROWS, {"messages": []}], skip_invalid=True)
    folder = str(tmp_path / "shards")
    where = {"data_files": folder + "/*.parquet"} if how == "data_files" else {"data_dir": folder}
    table = load_dataset("parquet", **where, split="train", cache_dir=str(tmp_path / "cache"))
    images = List(Image(decode=False))
    features = {"id": Value("string"), "messages": Json(), "tools": Json(), "images": images}
    assert table.features == features | {"enable_thinking": Value("bool")}
    for found, written in zip(table, load_trajectories(tmp_path / "rows.jsonl", ShardConfig()), strict=False):
        assert (found["id"], found["messages"], found["tools"]) == (written.id, written.messages, written.tools)
        assert [image["bytes"] for image in found["images"]] == written.images


def test_row_groups_and_shards_are_bound_by_bytes(tmp_path: Path, model: str, small_pieces: None) -> None:
    shard_rows(tmp_path, model, [row(number) for number in range(24)])
    files = sorted((tmp_path / "shards").glob("*.parquet"))
    assert len(files) > 2
    for file in files:
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        assert all(group.num_rows == 1 or group.total_byte_size < 2600 for group in groups)
        assert file.stat().st_size < 8000
        columns = [groups[0].column(i) for i in range(groups[0].num_columns)]
        assert [column.is_stats_set for column in columns] == [True, False, False, False, False, False]
        assert next(c for c in columns if c.path_in_schema.endswith("bytes")).compression == "UNCOMPRESSED"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, model: str, small_pieces: None) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard_rows(tmp_path / name, model, ROWS)
        files = set((tmp_path / name / "shards").iterdir()) - {
            tmp_path / name / "shards" / ".finished"
        }  # names the input
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1]


# ---- refused rows ----------------------------------------------------------------------------------------------------

BAD = [
    row(1),
    {"id": "no-assistant", "messages": [{"role": "user", "content": "Hello?"}]},
    row(2),
    row(1),
    row(3, id="fine"),
]


def test_one_bad_row_leaves_nothing_but_the_list_of_all_bad_rows(
    tmp_path: Path, model: str, small_pieces: None
) -> None:
    with pytest.raises(DataError, match=r"2 of 5 rows(.|\n)*--skip-invalid") as error:
        shard_rows(tmp_path, model, BAD)
    assert "rows.jsonl:2" in str(error.value)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["rejected.jsonl"]
    check_rejected(tmp_path)


def test_skip_invalid_writes_the_rest_and_counts_everything(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError):
        shard_rows(tmp_path, model, BAD)
    report = shard_rows(tmp_path, model, BAD, skip_invalid=True)  # what the refused run left is replaced
    check_rejected(tmp_path)
    assert [t.id for t in load_trajectories(tmp_path / "shards", ShardConfig())] == ["row-1", "row-2", "fine"]
    assert (report.num_read, report.num_written, report.num_rejected) == (5, 3, 2)
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        "train-00000.parquet",
        "manifest.arrow",
        "rejected.jsonl",
        "tools.json",
        ".finished",
    }


def check_rejected(folder: Path) -> None:
    rejected = [json.loads(line) for line in (folder / "shards" / "rejected.jsonl").read_text().splitlines()]
    assert [set(line) for line in rejected] == [{"file", "line", "error"}] * 2
    assert [(Path(line["file"]).name, line["line"]) for line in rejected] == [("rows.jsonl", 2), ("rows.jsonl", 4)]
    assert "'row-1'" in rejected[1]["error"]
    assert "rows.jsonl:1" in rejected[1]["error"]


def test_a_line_that_is_no_json_is_a_refused_row(tmp_path: Path, model: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    source.write_text(source.read_text() + "{broken\n")
    report = run_shard([source], tmp_path / "shards", model, ShardConfig(), True)
    assert (report.num_read, report.num_written, report.num_rejected) == (3, 2, 1)


def test_nothing_left_to_write_is_an_error(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError, match="1 were refused"):
        shard_rows(tmp_path, model, [{"messages": []}], skip_invalid=True)
    assert not (tmp_path / "shards" / "manifest.arrow").exists()


def test_finished_shards_and_strange_folders_are_never_overwritten(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS[:1])
    with pytest.raises(DataError, match="finished shards already"):
        shard_rows(tmp_path, model, ROWS[:2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-00000.parquet").touch()
    with pytest.raises(DataError, match=r"train-00000\.parquet"):
        run_shard([tmp_path / "rows.jsonl"], tmp_path / "mine", model, ShardConfig(), False)
    assert (tmp_path / "mine" / "train-00000.parquet").exists()


def test_what_a_killed_run_left_is_no_shard_folder_and_is_replaced(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    folder = tmp_path / "shards"
    (folder / "manifest.arrow").unlink()  # it comes last, so a killed run has none, but has these
    (folder / ".unfinished").write_text('{"shards": ["train-00000.parquet"]}')
    (folder / "..piece-00000-001.parquet.tmp").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="interrupted"):
        open_shards(folder)
    with pytest.raises(DataError, match="interrupted"):
        list(load_trajectories(folder, ShardConfig()))
    shard_rows(tmp_path, model, ROWS[:1])
    assert len(open_shards(folder)) == 1
    assert {path.name for path in folder.iterdir()} == {"train-00000.parquet", "manifest.arrow", ".finished"}


# ---- too long --------------------------------------------------------------------------------------------------------


def test_a_cut_ends_with_a_trained_assistant_message_and_never_inside_a_turn() -> None:
    said: dict[str, Any] = {"role": "assistant", "content": "One moment."}
    messages: Any = [
        {"role": "user", "content": "Two charts."},
        said,  # the text beside the call, moved in front of it
        call(1),
        answer(1, image=True),
        {**call(2), "train": False},
        answer(2, image=False),
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Welcome."},
    ]
    assert cut_points(messages) == [3, 7]


def test_cut_turns_keeps_the_longest_beginning_that_fits(tmp_path: Path, model: str) -> None:
    long = row(3, num_calls=6)  # an image comes back from each call
    encoder = load_encoder(model, EncodingConfig())
    (whole,) = load_trajectories(write_rows(tmp_path / "long.jsonl", [long]), ShardConfig())
    limit = len(encoder.encode(whole).input_ids) // 2
    report = shard_rows(tmp_path, model, [long, row(1)], max_length=limit, too_long="cut_turns")
    kept, _ = load_trajectories(tmp_path / "shards", ShardConfig())
    assert (report.num_cut, report.num_dropped, report.num_written) == (1, 0, 2)
    assert kept.messages == whole.messages[: len(kept.messages)]
    assert kept.messages[-1]["role"] == "assistant"
    encoded = encoder.encode(kept)
    assert len(encoded.input_ids) <= limit
    assert encoded.num_images == len(kept.images) == sum(message["role"] == "tool" for message in kept.messages)
    next_cut = min(end for end in cut_points(whole.messages) if end > len(kept.messages))
    longer = first_messages(whole, next_cut)
    assert len(encoder.encode(longer).input_ids) > limit, "one turn more would not fit"
    (line,) = (tmp_path / "shards" / "too_long.jsonl").read_text().splitlines()
    assert json.loads(line)["num_messages_kept"] == len(kept.messages)


def test_too_long_rows_are_dropped_and_counted_or_refused(tmp_path: Path, model: str) -> None:
    rows = [row(1), row(3, num_calls=6)]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* tokens .*max_length is 200"):
        shard_rows(tmp_path, model, rows, max_length=200, too_long="error")
    report = shard_rows(tmp_path, model, rows, max_length=200, too_long="drop")
    assert (report.num_read, report.num_written, report.num_dropped) == (2, 1, 1)
    assert "dropped for their length: 1, cut: 0" in report.summary()
    (line,) = (tmp_path / "shards" / "too_long.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "row-3"
    (tmp_path / "cut").mkdir()
    nothing_fits = shard_rows(tmp_path / "cut", model, [row(1), row(3, 6)], max_length=200, too_long="cut_turns")
    assert nothing_fits.num_dropped + nothing_fits.num_cut == 1


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_found_and_named(tmp_path: Path, model: str, small_pieces: None) -> None:
    shard_rows(tmp_path, model, ROWS)
    file = tmp_path / "shards" / "train-00001.parquet"
    intact = file.read_bytes()
    for position in np.linspace(0, len(intact) - 1, 60).astype(int):
        damaged = bytearray(intact)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00001\.parquet, row group \d+: .*row-\d+"):
            list(load_trajectories(tmp_path / "shards", ShardConfig()))
    file.write_bytes(intact)
    assert len(list(load_trajectories(tmp_path / "shards", ShardConfig()))) == 12


def test_a_truncated_or_missing_shard_is_found_and_named(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    file = tmp_path / "shards" / "train-00000.parquet"
    intact = file.read_bytes()
    for damaged in (intact[:-1], intact[: len(intact) // 2], b"", intact + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00000\.parquet, row group 0: .*bytes instead of.*row-0, row-1"):
            open_shards(tmp_path / "shards").read(0)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet"):
        open_shards(tmp_path / "shards").read(0)


def test_no_flipped_bit_of_a_manifest_is_unseen(tmp_path: Path, model: str) -> None:
    """`benchmarks/faults.py` flips every one."""
    shard_rows(tmp_path, model, ROWS[:2])
    file = tmp_path / "shards" / "manifest.arrow"
    intact = file.read_bytes()
    for bit in range(0, 8 * len(intact), 37):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=r"manifest\.arrow is damaged .*; make the shards again"):
            read_manifest(file, str(file))
    for damaged in (intact[: len(intact) // 2], b"", intact[:-1], intact + b"x", intact[40:], b"x" + intact):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest\.arrow is damaged"):
            open_shards(tmp_path / "shards")


def test_a_manifest_of_another_version_or_of_others_is_not_called_damaged(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_rows(tmp_path, model, ROWS[:2])
    file = tmp_path / "shards" / "manifest.arrow"
    monkeypatch.setattr(manifest_module, "FORMAT_VERSION", 9)
    with pytest.raises(DataError, match=r"manifest\.arrow has format version 3, this gemma_dist reads 2 to 4; make"):
        read_manifest(file, "manifest.arrow")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest_module, "read_seal", refuse)
    with pytest.raises(DataError, match=r"manifest\.arrow cannot be read \(Permission denied\); have its permissions"):
        read_manifest(file, "manifest.arrow")


# ---- shards of an earlier version ------------------------------------------------------------------------------------


def as_version_2(folder: Path) -> None:
    """Write the manifest of a folder anew as earlier versions did, with CRC-32 alone."""
    manifest = read_manifest(folder / "manifest.arrow", "")
    header: dict[str, Any] = {**manifest.header, "format_version": 2}
    places = [manifest.place(row_group) for row_group in range(manifest.table.num_rows)]
    files = [(folder / entry["name"]).read_bytes() for entry in header["shards"]]
    crc32 = [zlib.crc32(files[shard][at.offset : at.offset + at.num_bytes]) for shard, at in places]
    for number, (entry, data) in enumerate(zip(header["shards"], files, strict=True)):
        del entry["rest_digest"]
        entry["rest_crc32"] = zlib.crc32(data[:4] + data[-len(manifest.footer(number)) :])
    column = manifest.table.schema.get_field_index("digest")
    table = manifest.table.set_column(column, "crc32", pa.array(crc32, pa.int64()))
    text = json.dumps(header)
    crc = zlib.crc32(text.encode())
    for buffer in (buffer for column in table.columns for chunk in column.chunks for buffer in chunk.buffers()):
        crc = zlib.crc32(buffer, crc) if buffer else crc
    table = table.replace_schema_metadata({"header": text, "crc32": str(crc)})
    (folder / "manifest.arrow").unlink()  # it may be mapped
    with pa.ipc.new_file(folder / "manifest.arrow", table.schema) as target:
        target.write_table(table)


def test_shards_of_an_earlier_version_are_read_checked_and_added_to(
    tmp_path: Path, model: str, small_pieces: None
) -> None:
    shard_rows(tmp_path, model, ROWS[:8])
    folder = tmp_path / "shards"
    before = [open_shards(folder).read(index) for index in range(8)]
    as_version_2(folder)
    assert [open_shards(folder).read(index) for index in range(8)] == before
    more = write_rows(tmp_path / "more.jsonl", ROWS[8:])
    run_shard([more], folder, model, ShardConfig(), False, append=True)
    shards = open_shards(folder)
    assert [shards.read(index).id for index in range(12)] == [row["id"] for row in ROWS]
    for name in ("train-00000.parquet", sorted(folder.glob("train-*"))[-1].name):
        file = folder / name
        intact = file.read_bytes()
        for position in (2, 600, len(intact) - 20):
            file.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
            with pytest.raises(DataError, match=f"{name}, row group .*checksum"):
                list(load_trajectories(folder, ShardConfig()))
        file.write_bytes(intact)


def test_a_picture_that_was_exchanged_under_the_same_crc_is_found(tmp_path: Path, model: str) -> None:
    """CRC-32 can be given any value by four bytes of a file; SHA-256 cannot."""
    shard_rows(tmp_path, model, ROWS[:4])
    file = tmp_path / "shards" / "train-00000.parquet"
    intact = file.read_bytes()
    _, place = read_manifest(tmp_path / "shards" / "manifest.arrow", "").place(0)
    group = intact[place.offset : place.offset + place.num_bytes]
    forged = with_crc32(group[:1] + b"evil" + group[5:], zlib.crc32(group))
    assert zlib.crc32(forged) == zlib.crc32(group)
    assert forged != group
    file.write_bytes(intact[: place.offset] + forged + intact[place.offset + place.num_bytes :])
    with pytest.raises(DataError, match=r"train-00000\.parquet, row group 0: .*checksum"):
        open_shards(tmp_path / "shards").read(0)


def with_crc32(data: bytes, wanted: int) -> bytes:
    """`data` with its last four bytes so that its CRC-32 is `wanted` (each bit of them changes the sum on its own)."""
    start = data[:-4] + bytes(4)
    base = zlib.crc32(start)
    effects = [zlib.crc32(data[:-4] + (1 << bit).to_bytes(4, "little")) ^ base for bit in range(32)]
    rows = [(effect, 1 << bit) for bit, effect in enumerate(effects)]
    last, left = 0, base ^ wanted
    for bit in range(32):  # elimination over GF(2)
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows = [(e ^ pivot[0], b ^ pivot[1]) if e >> bit & 1 else (e, b) for e, b in rows if (e, b) != pivot]
        if left >> bit & 1:
            left, last = left ^ pivot[0], last ^ pivot[1]
    return data[:-4] + last.to_bytes(4, "little")


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gemma-dist shard"):
        open_shards(tmp_path)


def test_rows_of_the_hub_are_no_shards_and_it_is_said_what_takes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    url, told = "hf://datasets/org/rows", "rows of the hub are taken by `gemma-dist shard` "
    for words in (["stats", url], ["check", "launch/cpu_lora.yaml", f"data.train={url}"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"error: {url} holds no manifest.arrow: " in error
        assert told in error
        assert "trying again" not in error, "a hub that is not to be asked is not asked"
    assert main(["evaluate", "--model", "m", "--data", url, "--out", "out"]) == 2
    assert told in capsys.readouterr().err
    assert main(["merge", "--base", "m", "--adapter", "hf://org/adapter", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "what lies on a disk; name a path" in error
    assert "rows" not in error


def test_the_cache_holds_few_row_groups(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(shards_module, "NUM_CACHED_ROW_GROUPS", 2)
    shard_rows(tmp_path, model, ROWS)
    shards = open_shards(tmp_path / "shards")
    for index in (0, 1, 2, 1, 11, 0):
        assert shards.read(index).id == shards.id(index) == f"row-{index}"
        assert len(shards._tables) <= 2


def test_several_folders_are_one_corpus_if_they_were_encoded_alike(tmp_path: Path, model: str) -> None:
    for name, rows, template in (("a", ROWS[:4], None), ("b", ROWS[4:], None), ("c", ROWS, "gemma4_v2")):
        (tmp_path / name).mkdir()
        shard_rows(tmp_path / name, model, rows, chat_template=template)
    a, b, c = (tmp_path / name / "shards" for name in "abc")
    both = open_shards(a, b)
    assert [both.read(index).id for index in range(len(both))] == [row["id"] for row in ROWS]
    lengths = [*open_shards(a).num_text_tokens, *open_shards(b).num_text_tokens]
    assert both.num_text_tokens.tolist() == lengths
    assert len({both.manifest_hash, open_shards(b, a).manifest_hash, open_shards(a).manifest_hash}) == 3
    with pytest.raises(DataError, match="different tokenizers, chat templates"):
        open_shards(a, c)


def test_reasoning_that_the_template_drops_is_counted(tmp_path: Path, model: str) -> None:
    rows = [row(number) for number in range(3)]
    rows[1]["messages"][-1]["reasoning_content"] = "It is done."
    rows[2]["messages"][-1]["reasoning_content"] = "It is done."
    rows[2]["messages"] += [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Gladly."}]
    report = shard_rows(tmp_path, model, rows)
    assert report.num_dropped_reasoning == 1  # of the turn before the last question
    assert "1 messages lose their reasoning" in report.summary()
