"""Images of a trajectory: found, checked, and decoded in one place for all. What a row may say of one:

    "shots/1.png", "file:///data/shots/1.png"                   a file inside of the media root
    "data:image/png;base64,iVBORw0…", "iVBORw0…"                the file itself
    {"bytes": b"…", "path": "1.png"}                            `datasets`, in parquet
    {"url": "shots/1.png"}, {"base64": "iVBORw0…"}              what parts say (content.py)
    {"type": "image", "image": "shots/1.png"}, {"data": "iVBORw0…", "mimeType": "image/png"}        a part itself

Shards keep an image's file as it came; `decode_image` turns it into pixels wherever these are needed.
"""

import base64
import binascii
import io
import os
import re
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from gemma_dist.data.places import blobs_of
from gemma_dist.data.png import is_animated_png, mend_png
from gemma_dist.data.strict import get, reason, short
from gemma_dist.errors import DataError, setting

# Where the images are that a row names: a folder, which no path leads out of, or the files that came with the row.
Media: TypeAlias = Path | Mapping[str, bytes]

JPEG_QUALITY = 75  # of what people look at
# Where an object says what its image is. Bytes go before the path that they came from, as `datasets` has it.
SOURCE_KEYS = ("base64", "data", "b64_json", "bytes", "path", "url", "image", "image_url", "source")
BASE64_KEYS = ("base64", "data", "b64_json")
SCALED = "images of 16-bit or float gray are seen with 8 bits, scaled from their whole range"
FIRST_FRAME = "images of several frames or pages are seen as the first of them"

# Formats that PIL decodes by itself; among the others are some that start programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# How base64 of these begins: PNG, JPEG (also with the URL-safe alphabet), GIF, WEBP, BMP, TIFF.
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{40,}+={0,2}+\s*+")
_FROM_URL_SAFE = str.maketrans("-_", "+/")
# How to set upright what is stored in each way of EXIF but the first, which is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, name: str = "") -> Image.Image:
    """The image in an encoded file as the model sees it: RGB, upright, first frame, transparency laid on white.

    Gray of 16 bits is scaled from 0..65535, floats from 0..1. Other 32-bit gray (floats beyond 0..1, integers) says
    nowhere what is black and what is white, and is refused.

    DataError, which calls it `name`, if `data` is not a whole image in one of FORMATS. Metadata alone, broken or huge,
    is no reason.
    """
    try:
        with _open(data) as opened:
            turn = _UPRIGHT.get(_orientation(opened))
            opened.load()
            image = _to_rgb(opened)
            return image if turn is None else image.transpose(turn)
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise a dozen types on broken files, even struct.error, SyntaxError
        raise DataError(f"{_called(data, name)} does not decode: {reason(error)}; replace the file") from None


def thumbnail(data: bytes, longest_side: int) -> bytes:
    """An image file for people to look at, as the model sees it but no longer than so many pixels: a JPEG."""
    image = decode_image(data)
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the image that `decode_image` makes, from the file's header alone (but of TIFF)."""
    with _open(data) as opened:
        if opened.format == "TIFF":  # PIL turns it while it loads
            opened.load()
        width, height = opened.size
        is_on_its_side = _orientation(opened) in (5, 6, 7, 8)
    return (width, height) if is_on_its_side else (height, width)


def _open(data: bytes) -> Image.Image:
    """The file with its header read: size, mode and format, but no pixels yet."""
    return Image.open(io.BytesIO(mend_png(data)), formats=FORMATS)


def _orientation(opened: Image.Image) -> int:
    """EXIF's number for how the pixels of a file lie: 1 is upright; so is what broken metadata says nothing about."""
    if opened.format == "TIFF":
        return 1
    try:
        return int(Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever trips PIL in metadata
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bits for each of red, green and blue; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = _scale_16_bits(image)
    elif image.mode in ("I", "F"):
        image = _scale_32_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Gray of 8 bits; PIL's own conversion would make everything above 255 white."""
    samples = np.asarray(image).astype(np.uint32)
    if _white_is_zero(image):
        samples = 65535 - samples
    levels = ((samples + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[samples == transparent] = 255
    return Image.fromarray(levels)


def _scale_32_bits(image: Image.Image) -> Image.Image:
    """Gray of 8 bits from floats within 0..1."""
    samples = np.asarray(image)
    low, high = samples.min(), samples.max()
    if image.mode != "F" or not (low >= 0 and high <= 1):
        kind = "floats" if image.mode == "F" else "integers"
        raise DataError(
            f"the image holds 32-bit {kind} from {low:g} to {high:g}, and only floats from 0 to 1 say what is black "
            "and what is white; save it as gray of 8 or 16 bits"
        )
    if _white_is_zero(image):
        samples = 1 - samples
    return Image.fromarray((samples * 255 + 0.5).astype(np.uint8))


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts gray from white to black, which PIL minds with 8 bits alone."""
    return getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def count_pixels(data: bytes, max_image_pixels: int, name: str = "") -> int:
    """Width x height of an image, from the file's header alone. DataError, which calls it `name`, where they are more
    than the limit."""
    try:
        with _open(data) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise DataError(f"{_called(data, name)} is too large: {error}; scale it down") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise DataError(f"{_called(data, name)} is not readable as {formats}; replace the file") from None
    except Exception as error:
        raise DataError(f"{_called(data, name)} is not readable: {reason(error)}; replace the file") from None
    if width * height > max_image_pixels:
        raise DataError(
            f"{_called(data, name)} has {width} x {height} = {width * height:,} pixels, and the limit is "
            f"{max_image_pixels:,}; scale it down or use {setting('max_image_pixels', width * height)}"
        )
    return width * height


def _called(data: bytes, name: str) -> str:
    """What messages call an image: by its name, if it has one, and its bytes."""
    return f"the image {short(name)} ({len(data)} bytes)" if name else f"the image ({len(data)} bytes)"


def image_notes(data: bytes) -> list[str]:
    """What the model does not see of a file that can be decoded, in words."""
    with _open(data) as opened:
        notes = [SCALED] if opened.mode == "F" or opened.mode.startswith("I;16") else []
        if getattr(opened, "is_animated", False) or is_animated_png(data):
            notes.append(FIRST_FRAME)
    return notes


# ---- where the file is -----------------------------------------------------------------------------------------------


def load_image(source: object, media: Media, max_bytes: int = sys.maxsize) -> bytes:
    """The encoded file behind the image entry of a row.

    `source` is bytes, a string (a path inside `media`, a file: or data: URL, base64), or an object with one under a key
    of SOURCE_KEYS: {"bytes", "path"} as `datasets` stores them, {"url"}, {"base64"}, a part. DataError if it is none of
    these, does not exist, lies outside `media` or on a network, or is a file of more than `max_bytes`.
    """
    found = source
    for key in SOURCE_KEYS:
        given = get(source, key)
        if given is not None and key in BASE64_KEYS and isinstance(given, str):
            return _from_data_url_or_base64(given)
        if isinstance(given, dict):
            return load_image(given, media, max_bytes)
        if given is not None:
            found = given
            break
    if isinstance(found, bytes):
        return found
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"the image {short(source)} is no path, data: URL, base64 text or bytes; give one of them")
    return _from_string(found, media, max_bytes)


def image_name(source: object) -> str:
    """How the image entry of a row names its file, for messages: a path or an URL. Empty where it holds the bytes."""
    for key in (*BASE64_KEYS, "path", *SOURCE_KEYS):
        given = get(source, key)
        if key not in BASE64_KEYS and isinstance(given, str | dict):
            return image_name(given)
    is_name = isinstance(source, str) and not source.startswith("data:") and not source.startswith(_BASE64_HEADS)
    return str(source) if is_name else ""


def _from_string(text: str, media: Media, max_bytes: int) -> bytes:
    """The file that a string says: data: or file: URL, base64 without a URL around it, or a path."""
    if text.startswith("data:"):
        return _from_data_url_or_base64(text)
    if text[:7].lower() == "file://":
        return _from_path(_path_of_url(text), media, max_bytes)
    if "://" in text[:20]:
        raise DataError(
            f"the image {short(text)} lies elsewhere; nothing is downloaded: fetch it first and give its path"
        )
    is_base64 = text.startswith(_BASE64_HEADS) and _BASE64.fullmatch(text) is not None
    if is_base64 and not (_is_file(media / text) if isinstance(media, Path) else text in media):
        return _from_base64(text)
    return _from_path(text, media, max_bytes)


def _from_data_url_or_base64(text: str) -> bytes:
    """The bytes of data:image/png;base64,iVBORw0…, or of the base64 alone."""
    if not text.startswith("data:"):
        return _from_base64(text)
    head, comma, payload = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(f"the image {short(text)} is no base64 data: URL; write data:image/png;base64,...")
    return _from_base64(unquote(payload))


def _from_base64(text: str) -> bytes:
    """The bytes of base64 in either alphabet, padded or not, in lines or not."""
    digits = "".join(text.split()).translate(_FROM_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image {short(text)} is not base64: {error}; encode the file again") from None


def _path_of_url(url: str) -> str:
    """The path in file:///folder/name.png, with or without `localhost`."""
    host, slash, path = url[7:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise DataError(f"the image {short(url)} names the host {short(host)}; write file:///FOLDER/NAME or the path")
    return "/" + unquote(path)


def _from_path(text: str, media: Media, max_bytes: int) -> bytes:
    """The file of a path, whose accents may be composed (as Linux and the web write them) or not (as a Mac does)."""
    if not isinstance(media, Path):
        name = text.removeprefix("./")
        if name not in media:
            raise DataError(f"the image {short(text)} is none of the files of the row, {short(list(media))}; add it")
        return media[name]
    try:
        root = media.resolve()
        blobs = blobs_of(root)
        for spelled in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
            path = (root / spelled).resolve()  # follows symbolic links, so that they cannot lead out of the root either
            is_blob = Path(os.path.normpath(root / spelled)).is_relative_to(root) and path.parent == blobs
            if not is_blob and not path.is_relative_to(root):
                raise DataError(
                    f"the image {short(text)} lies outside the media root {root}; move it there or use "
                    f"{setting('media_root', 'FOLDER')}"
                )
            if path.is_file():
                if (num_bytes := path.stat().st_size) > max_bytes:
                    raise DataError(
                        f"the image {short(text)} has {num_bytes:,} bytes, and with it the row has more than it may "
                        f"have; scale it down or use {setting('max_row_bytes', 2 * num_bytes)}"
                    )
                return path.read_bytes()
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, a circle of links
        raise DataError(f"the image {short(text)} cannot be read: {reason(error)}; give a path of an image") from None
    raise DataError(
        f"the image {short(text)} is no file in the media root {root}; add it or use {setting('media_root', 'FOLDER')}"
    )


def _is_file(path: Path) -> bool:
    """Whether there is a file of this path; no string is too odd to be asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # base64 makes a poor file name
        return False
