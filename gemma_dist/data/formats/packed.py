"""Packed files (.gz, .zst) as the bytes that they hold, a megabyte at a time, and where one can begin to unpack.

A packed stream can only be read from its front. But a file may be several of them, one behind the other: the members
of gzip (RFC 1952; `bgzip`, or files that were joined) and the frames of zstd (RFC 8878; `pzstd`, `zstd -T`, or joined
ones). Each can be unpacked alone.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

PACKED = (".gz", ".zst")
CHUNK_BYTES = 1 << 20  # unpacked at a time, at most: what a bomb of a few bytes takes, too
PACKED_BYTES = 1 << 16  # read at a time
GZIP = 16 + zlib.MAX_WBITS  # zlib's word for gzip's header and checksum
FRAME, SKIPPABLE = 0xFD2FB528, 0x184D2A50  # how a frame of zstd begins; of the latter, the last four bits are free


def unpack(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """What a packed file holds from byte `start` of it on, where a member or frame begins: for each chunk the byte at
    which its own member or frame does, and the chunk.

    Raises:
        OSError, EOFError, zlib.error, pa.ArrowException: it is damaged, cut short, or nothing of the kind.
    """
    with path.open("rb") as file:
        file.seek(start)
        yield from _unpack_gzip(file) if path.suffix == ".gz" else _unpack_zstd(path, file)


def _unpack_gzip(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    packed = file.read(PACKED_BYTES)
    while packed:
        member = file.tell() - len(packed)
        unpacker = zlib.decompressobj(GZIP)
        while not unpacker.eof:
            packed = packed or file.read(PACKED_BYTES)
            chunk = unpacker.decompress(packed, CHUNK_BYTES)
            if not packed and not chunk:
                raise EOFError("it ends within its packed data")
            packed = unpacker.unconsumed_tail
            if chunk:
                yield member, chunk
        packed = unpacker.unused_data.lstrip(b"\0")  # some writers fill up with zeros
        while not packed and (read := file.read(PACKED_BYTES)):
            packed = read.lstrip(b"\0")


def _unpack_zstd(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    frame = file.tell()
    if not path.stat().st_size:
        return
    with pa.memory_map(str(path)) as source:
        while (end := _end_of_frame(file, frame)) is not None:
            source.seek(frame)
            with pa.CompressedInputStream(pa.BufferReader(source.read_buffer(end - frame)), "zstd") as unpacker:
                while chunk := unpacker.read(CHUNK_BYTES):
                    yield frame, chunk
            frame = end


def _end_of_frame(file: IO[bytes], start: int) -> int | None:
    """Where the frame of zstd that begins at byte `start` ends, from the sizes of its blocks; None: the file ends."""
    file.seek(start)
    magic = file.read(4)
    if not magic:
        return None
    number = int.from_bytes(magic, "little")
    if number & ~0xF == SKIPPABLE:
        end = start + 8 + _number(file, 4)
    elif number == FRAME:
        end = _end_of_blocks(file)
    else:
        raise OSError(f"byte {start:,} of it begins no frame of zstd")
    if file.seek(0, 2) < end:
        raise EOFError("it ends within its packed data")
    return end


def _end_of_blocks(file: IO[bytes]) -> int:
    """Where a frame ends, from behind its magic number (RFC 8878, 3.1.1)."""
    descriptor = _number(file, 1)
    is_one_segment = descriptor >> 5 & 1
    size_bytes = (is_one_segment, 2, 4, 8)[descriptor >> 6]
    file.seek(1 - is_one_segment + (0, 1, 2, 4)[descriptor & 3] + size_bytes, 1)
    while True:
        block = _number(file, 3)
        is_repeated = block >> 1 & 3 == 1  # one byte, many times
        file.seek(1 if is_repeated else block >> 3, 1)
        if block & 1:  # the last one
            return file.tell() + 4 * (descriptor >> 2 & 1)  # a checksum


def _number(file: IO[bytes], num_bytes: int) -> int:
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError("it ends within its packed data")
    return int.from_bytes(data, "little")
