"""PNG files without what PIL stops at though no pixel depends on it: broken metadata, huge texts, color profiles."""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 1 << 20  # bytes of a text that PIL reads
# Texts that may say how the image is turned.
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"


def mend_png(data: bytes) -> bytes:
    """The file with the chunks of its pixels and, in front of these, sound ones that say how it is turned.

    Any other file, and what is broken about the pixels, is left as it is.
    """
    if not data.startswith(SIGNATURE):
        return data
    header: list[memoryview] = []
    turning: list[memoryview] = []
    pixels: list[memoryview] = []
    position = len(SIGNATURE)
    for kind, chunk in _chunks(memoryview(data)):
        position += len(chunk)
        is_needed = kind[:1].isupper() or kind == b"tRNS"  # as PNG marks chunks without which nothing decodes
        if kind == b"IHDR":
            header.append(chunk)
        elif is_needed:
            pixels.append(chunk)
        elif _says_how_it_is_turned(kind, chunk):
            turning.append(chunk)
    return b"".join([SIGNATURE, *header, *turning, *pixels, data[position:]])


def is_animated_png(data: bytes) -> bool:
    """Whether a file is a PNG of several frames."""
    return data.startswith(SIGNATURE) and any(kind == b"acTL" for kind, _ in _chunks(memoryview(data)))


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and bytes of each whole chunk: length, kind, payload, checksum."""
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if end > len(data):
            return
        yield bytes(data[position + 4 : position + 8]), data[position:end]
        position = end


def _says_how_it_is_turned(kind: bytes, chunk: memoryview) -> bool:
    """Whether a chunk is EXIF or XMP (in which cameras and editors say it), small and with the right checksum."""
    if len(chunk) > MAX_TEXT or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    payload = bytes(chunk[8:-4])
    if kind == b"iTXt":
        return payload.startswith(_XMP + b"\0")  # not compressed
    if kind == b"zTXt":
        return payload.startswith(_RAW_EXIF) and _is_small(payload[len(_RAW_EXIF) + 1 :])
    return kind == b"eXIf" or (kind == b"tEXt" and payload.startswith(_RAW_EXIF))


def _is_small(packed: bytes) -> bool:
    """Whether a zlib stream unpacks to what PIL reads."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, MAX_TEXT)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail
