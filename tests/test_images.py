"""What the model sees of an image file, pixel by pixel, and where the files of a row's images are found."""

import base64
import io
import random
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gemma_dist.config import RowConfig
from gemma_dist.data.images import FIRST_FRAME, SCALED, count_pixels, decode_image, image_size, load_image
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of TIFF


def saved(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def seen(data: bytes) -> list[tuple[int, ...]]:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image_size(data) == (image.height, image.width)
    assert count_pixels(data, 1000) == image.width * image.height
    pixels = np.asarray(image).reshape(-1, 3)
    return [tuple(map(int, pixel)) for pixel in pixels]


def row_of(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def gray(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_gray_of_16_bits_is_scaled(mode: str, kind: str) -> None:
    samples = np.array([[0, 128, 129, 257, 128 * 257, 65535]], dtype=">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (6, 1), samples.tobytes())
    assert seen(saved(image, kind)) == gray(0, 0, 1, 1, 128, 255)


def test_the_transparent_level_of_gray_of_16_bits_is_white() -> None:
    data = saved(Image.frombytes("I;16", (2, 1), np.array([300, 5140], dtype="<u2").tobytes()))
    transparent = chunk(b"tRNS", struct.pack(">H", 300))
    assert seen(before_pixels(data, transparent)) == gray(255, 20)


@pytest.mark.parametrize(
    "image", [row_of("F", 0.0, 1.0, 0.2), row_of("I;16", 0, 65535, 51 * 257), row_of("L", 0, 255, 51)]
)
def test_tiff_that_counts_from_white_is_inverted(image: Image.Image) -> None:
    data = saved(image, "TIFF")
    at = data.index(struct.pack("<HHI", PHOTOMETRIC, 3, 1)) + 8
    assert seen(data) == gray(0, 255, 51)
    assert seen(data[:at] + b"\0" + data[at + 1 :]) == gray(255, 0, 204)


def test_floats_from_0_to_1_are_scaled() -> None:
    assert seen(saved(row_of("F", 0.0, 0.5, 0.25, 1.0), "TIFF")) == gray(0, 128, 64, 255)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (row_of("F", 0.0, 255.0), "32-bit floats from 0 to 255"),
        (row_of("F", -0.5, 1.0), "32-bit floats from -0.5 to 1"),
        (row_of("F", float("nan"), 1.0), "32-bit floats from nan"),
        (row_of("I", 3, 70000), "32-bit integers from 3 to 70000"),
    ],
)
def test_samples_without_a_known_white_are_refused(image: Image.Image, words: str) -> None:
    with pytest.raises(DataError, match=f"{words}.*save it as gray of 8 or 16 bits"):
        decode_image(saved(image, "TIFF"))


def palette(*colors: tuple[int, int, int]) -> Image.Image:
    image = row_of("P", *range(len(colors)))
    image.putpalette([level for color in colors for level in color])
    return image


@pytest.mark.parametrize(
    ("data", "right"),
    [
        (saved(palette(RED, BLUE)), [RED, BLUE]),
        (saved(palette(RED, BLUE, BLACK), transparency=1), [RED, WHITE, BLACK]),
        (saved(palette(RED, BLUE, BLACK), transparency=bytes([255, 0, 128])), [RED, WHITE, (127, 127, 127)]),
        (saved(palette(RED, BLUE), "GIF", transparency=1), [RED, WHITE]),
        (saved(row_of("L", 0, 7, 255)), gray(0, 7, 255)),
        (saved(row_of("L", 0, 7), transparency=7), gray(0, 255)),
        (saved(row_of("LA", (0, 255), (0, 0), (0, 128))), gray(0, 255, 127)),
        (saved(row_of("LA", (0, 255), (9, 0)), "TIFF"), gray(0, 255)),
        (saved(row_of("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))), [RED, WHITE]),
        (saved(row_of("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), "WEBP", lossless=True, exact=True), [RED, WHITE]),
        (saved(row_of("RGB", RED, BLUE), transparency=BLUE), [RED, WHITE]),
        (saved(row_of("1", 0, 1)), gray(0, 255)),
        (saved(row_of("1", 0, 1), "BMP"), gray(0, 255)),
        (saved(row_of("1", 0, 1), "TIFF"), gray(0, 255)),
        (saved(row_of("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)), "TIFF"), [RED, BLACK, WHITE]),
    ],
)
def test_every_kind_of_pixel_is_rgb_on_white(data: bytes, right: list[tuple[int, int, int]]) -> None:
    assert seen(data) == right


def test_cmyk_of_jpeg_is_not_inverted() -> None:
    """Adobe's programs store the inverse, and say so; PIL writes as they do."""
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(np.array(seen(data)) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [Image.new("RGB", (2, 1), color) for color in (RED, BLUE)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert seen(data) == [RED, RED]


# ---- turned by EXIF, and metadata that is broken ---------------------------------------------------------------------

# The upright image of 3 x 2 pixels, and how its file holds it for each orientation.
UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT[::-1, ::-1].T,
    8: UPRIGHT.T[:, ::-1],
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_turned_images_are_seen_upright(kind: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation])).convert("RGB")
    if kind == "JPEG":  # which blurs single pixels
        stored = stored.resize((stored.width * 16, stored.height * 16), Image.Resampling.NEAREST)
    settings_of: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    settings = settings_of.get(kind, {})
    data = saved(stored, kind, exif=exif_of(orientation), **settings)
    image = decode_image(data)
    assert image_size(data) == (image.height, image.width)
    if kind == "JPEG":
        assert image.size == (48, 32)
        image = image.resize((3, 2), Image.Resampling.BOX)
    assert np.abs(np.asarray(image.convert("L")).astype(int) - UPRIGHT).max() <= (3 if kind == "JPEG" else 0)


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def before_pixels(data: bytes, *chunks: bytes) -> bytes:
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def behind_pixels(data: bytes, *chunks: bytes) -> bytes:
    return data[:-12] + b"".join(chunks) + data[-12:]


TURNED = exif_of(6).tobytes().removeprefix(b"Exif\0\0")
HUGE = zlib.compress(b"x" * 3_000_000)
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6">'
BROKEN_SUM = chunk(b"eXIf", TURNED)[:-4] + b"\0\0\0\0"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("put", [before_pixels, behind_pixels])
@pytest.mark.parametrize(
    ("added", "is_turned"),
    [
        (chunk(b"eXIf", TURNED), True),
        (chunk(b"iTXt", XMP), True),
        (chunk(b"eXIf", exif_of(9).tobytes()[6:]), False),
        (chunk(b"eXIf", exif_of(700).tobytes()[6:]), False),
        (chunk(b"eXIf", b"no TIFF in here"), False),
        (chunk(b"eXIf", TURNED[:-9]), None),
        (chunk(b"eXIf", b""), False),
        (BROKEN_SUM, False),
        (chunk(b"zTXt", b"Comment\0\0" + HUGE), False),
        (chunk(b"iTXt", b"Comment\0\1\0\0\0" + HUGE), False),
        (chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000), False),
        (chunk(b"iCCP", b"profile\0\0" + HUGE), False),
        (chunk(b"zTXt", b"Raw profile type exif\0\0" + HUGE), False),
        (chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"), False),
        (chunk(b"gAMA", b"") + chunk(b"pHYs", b"1"), False),
        (chunk(b"zTXt", b"Comment\0\0" + HUGE) + chunk(b"eXIf", TURNED), True),
    ],
)
def test_metadata_of_a_png_is_no_reason_to_refuse_it(put: Any, added: bytes, is_turned: bool | None) -> None:
    data = put(saved(row_of("RGB", RED, BLUE)), added)
    assert seen(data) == [RED, BLUE]
    if is_turned is not None:
        assert image_size(data) == ((2, 1) if is_turned else (1, 2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_broken_exif_of_other_formats_is_no_reason_either(kind: str) -> None:
    data = saved(Image.new("RGB", (3, 2), "red"), kind, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert decode_image(data).size == (3, 2)
    assert image_size(data) == (2, 3)


def test_a_text_that_pil_takes_keeps_its_place() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "small")
    assert seen(saved(row_of("RGB", RED), pnginfo=texts)) == [RED]


# ---- where an image is found -----------------------------------------------------------------------------------------

PNG = saved(Image.new("RGB", (4, 3), "red"))
# Its base64 needs padding and has digits of which the URL-safe alphabet writes others.
ODD = PNG + random.Random(0).randbytes(2000 - len(PNG) % 3)
assert len(ODD) % 3 == 2
assert {"+", "/"} <= set(base64.b64encode(ODD).decode())


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(ODD).decode(),
        base64.b64encode(ODD).decode().rstrip("="),
        base64.urlsafe_b64encode(ODD).decode(),
        base64.urlsafe_b64encode(ODD).decode().rstrip("="),
        base64.encodebytes(ODD).decode(),
    ],
)
@pytest.mark.parametrize("form", ["text", "data url", "percent", "base64 key"])
def test_base64_in_every_spelling(tmp_path: Path, text: str, form: str) -> None:
    sources: dict[str, Any] = {
        "text": text,
        "data url": f"data:image/png;base64,{text}",
        "percent": f"data:image/png;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
        "base64 key": {"base64": text},
    }
    assert load_image(sources[form], tmp_path) == ODD


def test_what_is_no_base64_of_an_image_is_a_path(tmp_path: Path) -> None:
    name = "run_17/step-0003/screenshot_of_the_whole_desktop_after"
    with pytest.raises(DataError, match="is no file in the media root"):
        load_image(name, tmp_path)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(PNG)
    assert load_image(name, tmp_path) == PNG
    with pytest.raises(DataError, match="is not base64"):
        load_image({"base64": "a.png"}, tmp_path)


def test_file_urls_lead_into_the_media_root_alone(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    for url in (f"file://{root}/a%20b.png", f"file://localhost{root}/a b.png", f"FILE://{root}/a%20b.png"):
        assert load_image(url, root) == PNG
    for url in (f"file://{tmp_path}/secret.png", f"file://{root}/%2e%2e/secret.png"):
        with pytest.raises(DataError, match="lies outside the media root"):
            load_image(url, root)
    with pytest.raises(DataError, match="names the host 'images'; write file:///FOLDER/NAME or the path"):
        load_image("file://images/a.png", root)


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_with_accents_are_found_however_they_are_composed(tmp_path: Path, on_disk: Any, in_row: Any) -> None:
    name = "Größe/détail.png"
    file = tmp_path / unicodedata.normalize(on_disk, name)
    file.parent.mkdir()
    file.write_bytes(PNG)
    assert load_image(unicodedata.normalize(in_row, name), tmp_path) == PNG


# ---- rows ------------------------------------------------------------------------------------------------------------

COLORS = {name: saved(Image.new("RGB", (4, 3), name)) for name in ("red", "green", "blue")}


def parse(row: Any, folder: Path) -> Trajectory:
    for name, data in COLORS.items():
        (folder / f"{name}.png").write_bytes(data)
    return parse_row(row, f"{folder}/rows.jsonl:1", RowConfig())


def asked(content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}], **columns}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("row", "content", "colors"),
    [
        (asked("<image>What?", images=["red.png"]), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", images="red.png"), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", images='["red.png"]'), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", image="red.png"), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", image=["red.png"]), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", image={"bytes": COLORS["red"], "path": "x.png"}), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", image={"bytes": None, "path": "red.png"}), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", image="red.png", images=["red.png"]), [IMAGE, TEXT], ["red"]),
        (asked("<image><image>What?", images=["red.png", "blue.png"]), [IMAGE, IMAGE, TEXT], ["red", "blue"]),
        (asked([{"type": "text", "text": "<image>What?"}], images=["red.png"]), [IMAGE, TEXT], ["red"]),
        (asked([IMAGE, TEXT], image="red.png"), [IMAGE, TEXT], ["red"]),
        (asked("<image>What?", images=["red.png"], image={"path": None, "bytes": None}), [IMAGE, TEXT], ["red"]),
        (
            asked([IMAGE, {"type": "text", "text": "<image>What?"}], images=["red.png", "blue.png"]),
            None,
            ["red", "blue"],
        ),
        (asked("Write <image> there."), "Write <image> there.", []),
        (asked("Write <image> there.", images=[]), "Write <image> there.", []),
        (
            asked([IMAGE | {"index": 0, "text": None}, TEXT | {"index": None}], images=["red.png"]),
            [IMAGE, TEXT],
            ["red"],
        ),
    ],
)
def test_images_beside_the_messages_and_their_markers(
    tmp_path: Path, row: Any, content: Any, colors: list[str]
) -> None:
    trajectory = parse(row, tmp_path)
    assert trajectory.images == [COLORS[color] for color in colors]
    assert trajectory.messages[0]["content"] == ([IMAGE, IMAGE, TEXT] if content is None else content)


def test_a_marker_is_a_word_where_every_image_has_a_part(tmp_path: Path) -> None:
    row = asked([IMAGE, {"type": "text", "text": "What is <image>?"}], images=["red.png"])
    assert parse(row, tmp_path).messages[0]["content"] == [IMAGE, {"type": "text", "text": "What is <image>?"}]


def test_markers_of_all_turns_take_the_images_in_order(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "<image> stands for an image."},
        {"role": "user", "content": "<image>Go."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "c", "content": "shot: <image>"},
        {"role": "assistant", "content": "<image>"},
    ]
    trajectory = parse({"messages": messages, "images": ["red.png", "green.png", "blue.png"]}, tmp_path)
    assert trajectory.images == [COLORS["red"], COLORS["green"], COLORS["blue"]]
    assert trajectory.messages[0]["content"] == "<image> stands for an image."
    assert trajectory.messages[3]["content"] == [{"type": "text", "text": "shot: "}, IMAGE]
    assert trajectory.messages[4]["content"] == [IMAGE]


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (saved(Image.new("I;16", (2, 1))), {SCALED: 1}),
        (saved(Image.new("F", (2, 1)), "TIFF"), {SCALED: 1}),
        *[
            (
                saved(Image.new("RGB", (2, 1)), kind, save_all=True, append_images=[Image.new("RGB", (2, 1), "red")]),
                {FIRST_FRAME: 1},
            )
            for kind in ("GIF", "WEBP", "PNG", "TIFF")
        ],
        (saved(Image.new("RGBA", (2, 1))), {}),
        (saved(Image.new("P", (2, 1)), "GIF"), {}),
    ],
)
def test_what_is_not_seen_of_an_image_is_counted(tmp_path: Path, data: bytes, notes: dict[str, int]) -> None:
    assert parse(asked("<image>What?", images=[{"bytes": data}]), tmp_path).notes == notes


NULLS = {"path": None, "bytes": None}
REFUSED: list[tuple[Any, str]] = [
    (asked([IMAGE, TEXT], image=NULLS), "`images` holds 0 images for 1 image parts without one of their own"),
    (
        asked("<image><image>What?", images=["red.png"]),
        "`images` holds 1 images for 2 `<image>` markers and 0 image parts without one of their own",
    ),
    (asked("What?", image="red.png"), "`images` holds 1 images for 0 image parts without one of their own"),
    (asked("What?", images=["red.png"]), "write a part or a marker <image> where each image belongs"),
    (asked("<image>", image="red.png", images=["blue.png"]), "`images` is ['blue.png'], `image` is ['red.png']; keep"),
    (asked("<video>What?", videos=["a.mp4"]), "the row brings `videos`"),
    (asked("<video>What?", video="a.mp4"), "the row brings `video`"),
    (asked("<audio>What?", audio={"bytes": b"R", "path": None}), "the row brings `audio`"),
    (asked("<audio>What?", audio_path="a.wav"), "the row brings `audio_path`"),
    (asked("<image 1>What?", image_1="red.png"), "the column `image_1` brings an image, but is not read"),
    (asked("<image>What?", image_path="red.png"), "the column `image_path` brings an image, but is not read"),
    (asked("What?", screenshots=["red.png"]), "the column `screenshots` brings an image, but is not read"),
    (
        asked("<image>Where is <bbox>?", images=["red.png"], objects={"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}),
        "`objects` holds what <ref-object> and <bbox> in the texts stand for",
    ),
    (
        asked([IMAGE | {"file_id": "f-1"}], images=["red.png"]),
        "turn 1 (user): the image part has ['file_id'], which is not known",
    ),
    (asked([IMAGE | {"source": "red.png"}], images=["red.png"]), "the image part has ['source'], which is not known"),
    (asked([IMAGE | {"index": 1}, IMAGE | {"index": 0}], images=["red.png", "blue.png"]), "the part takes image 1 of"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_images_that_are_not_taken_are_refused(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row, tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "beside",
    [
        *({"video": None}, {"audio": ""}, {"image_1": None}, {"objects": {}}, {"image_id": "7"}),
        # as Arrow fills in
        *({"image": NULLS}, {"image_1": NULLS}, {"audio": NULLS}, {"audio": NULLS | {"array": None}}),
        *({"videos": [None]}, {"images": None, "image": NULLS}, {"images": [], "image": NULLS}),
    ],
)
def test_columns_without_an_image_are_no_reason_to_refuse_a_row(tmp_path: Path, beside: Any) -> None:
    assert parse(asked("What?", **beside), tmp_path).images == []


def test_the_path_of_an_image_that_is_there_is_not_asked_about(tmp_path: Path) -> None:
    assert parse(asked("<image>What?", images=["red.png"], image_path="red.png"), tmp_path).images == [COLORS["red"]]


BASE64 = base64.b64encode(COLORS["red"]).decode()


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "red.png"},
        {"image": {"path": "red.png", "bytes": None}},
        {"type": "image", "image": "red.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"image_url": "red.png"},
        {"data": BASE64, "mimeType": "image/png"},
        {"type": "image", "data": BASE64, "mimeType": "image/png"},
        {"data": COLORS["red"]},
        {"b64_json": BASE64},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"image": {"base64": BASE64}},
    ],
)
@pytest.mark.parametrize("column", ["images", "image"])
def test_an_image_of_the_column_may_be_written_as_a_part(tmp_path: Path, entry: Any, column: str) -> None:
    given = [entry] if column == "images" else entry
    assert parse(asked("<image>What?", **{column: given}), tmp_path).images == [COLORS["red"]]


@pytest.mark.parametrize("mime", ["mimeType", "mime_type", "media_type"])
def test_an_mcp_image_is_its_own_and_no_image_of_the_row(tmp_path: Path, mime: str) -> None:
    inline = {"type": "image", "data": base64.b64encode(COLORS["blue"]).decode(), mime: "image/png"}
    row = asked([inline, IMAGE], images=["red.png"])
    assert parse(row, tmp_path).images == [COLORS["blue"], COLORS["red"]]
    row = asked([inline, TEXT], images=["red.png"])
    with pytest.raises(DataError, match="`images` holds 1 images for 0 image parts"):
        parse(row, tmp_path)


# ---- the files of the cases ------------------------------------------------------------------------------------------


def test_case_of_16_bits(shared: Path) -> None:
    assert len(set(seen_of(shared, "image_gray16.png.jsonl"))) == 256


def test_case_of_floats(shared: Path) -> None:
    pixels = seen_of(shared, "image_float01.tiff.jsonl")
    assert (min(pixels), max(pixels)) == (BLACK, WHITE)
    assert len(set(pixels)) > 200


def seen_of(shared: Path, name: str) -> list[tuple[int, ...]]:
    ((where, row),) = read_rows([shared / "cases" / "data" / name])
    (data,) = parse_row(row, where, RowConfig()).images
    return [tuple(map(int, pixel)) for pixel in np.asarray(decode_image(data)).reshape(-1, 3)]


@pytest.mark.parametrize("name", ["format_lf_mllm_images", "format_mcp_trace_result"])
def test_cases_of_markers_and_mcp(shared: Path, name: str) -> None:
    folder = shared / "cases" / "data"
    ((where, row),) = read_rows([folder / f"{name}.jsonl"])
    assert len(parse_row(row, where, RowConfig()).images) == 1
