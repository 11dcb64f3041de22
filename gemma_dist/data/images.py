"""Images of a trajectory: found (path, data: URL, base64, bytes), checked, and decoded in one place for all.

Shards keep an image's file as it came; `decode_image` turns it into pixels wherever these are needed.
"""

import base64
import binascii
import io
import re
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from gemma_dist.data.strict import reason, short
from gemma_dist.errors import DataError, setting

# Formats that PIL decodes by itself; among the others are some that start programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")


def decode_image(data: bytes) -> Image.Image:
    """The image in an encoded file: RGB, turned as its EXIF says, first frame, transparency laid on white.

    DataError if `data` is not a whole image in one of FORMATS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise a dozen types on broken files, even struct.error, SyntaxError
        raise DataError(f"the image ({len(data)} bytes) does not decode: {reason(error)}; replace the file") from None


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the image that `decode_image` makes, from the file's header alone."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter, mirrored or not
    return (width, height) if turned else (height, width)


def check_image(data: bytes, max_image_pixels: int) -> None:
    """DataError unless `data` decodes to its last row and has at most `max_image_pixels` (width x height)."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise DataError(f"the image is too large: {error}; scale it down") from None
    except Exception as error:
        raise DataError(f"the image ({len(data)} bytes) is not readable: {reason(error)}; replace the file") from None
    if width * height > max_image_pixels:
        raise DataError(
            f"the image has {width} x {height} = {width * height:,} pixels, the limit is {max_image_pixels:,}; "
            f"scale it down or use {setting('max_image_pixels', width * height)}"
        )
    decode_image(data)


def load_image(source: object, media_root: Path) -> bytes:
    """The encoded file behind the image entry of a row.

    `source` is bytes, {"bytes", "path"} as `datasets` stores them, {"url"}, or a string: a path inside `media_root`, a
    data: URL, or base64. DataError if it is none of these, does not exist, lies outside `media_root` or on a network.
    """
    if isinstance(source, dict):
        source = next((source[key] for key in ("bytes", "path", "url", "base64") if source.get(key) is not None), None)
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str) or not source.strip():
        raise DataError(f"the image {short(source)} is no path, data: URL, base64 text or bytes; give one of them")
    if source.startswith("data:"):
        head, comma, payload = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(f"the image {short(source)} is no base64 data: URL; write data:image/png;base64,...")
        return _from_base64(payload)
    if "://" in source[:20]:
        raise DataError(
            f"the image {short(source)} lies elsewhere; nothing is downloaded: fetch it first and give its path"
        )
    if _BASE64.fullmatch(source) and not _is_file(media_root / source):
        return _from_base64(source)
    return _from_path(source, media_root)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image {short(text)} is not base64: {error}; encode the file again") from None


def _from_path(text: str, media_root: Path) -> bytes:
    try:
        root = media_root.resolve()
        path = (root / text).resolve()  # follows symbolic links, so that they cannot lead out of the root either
        if not path.is_relative_to(root):
            raise DataError(
                f"the image {short(text)} lies outside the media root {root}; move it there or use "
                f"{setting('media_root', 'FOLDER')}"
            )
        if not path.is_file():
            raise DataError(
                f"the image {short(text)} is no file in the media root {root}; add it or use "
                f"{setting('media_root', 'FOLDER')}"
            )
        return path.read_bytes()
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, a circle of links
        raise DataError(f"the image {short(text)} cannot be read: {reason(error)}; give a path of an image") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # base64 makes a poor file name
        return False
