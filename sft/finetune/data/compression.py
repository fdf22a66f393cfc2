"""Compressed streams, read in pieces: what a small file unpacks to need not fit into memory."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, cast
from zipfile import BadZipFile

import zstandard

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
# A Zstandard block of some bytes holds up to 128 KiB: of 1 KiB come tens of megabytes at most.
ZST_READ_BYTES = 1024
GZIP_MAGIC = b"\x1f\x8b"

# What the libraries raise for a file that is damaged or ends too early.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, BadZipFile)


def decompress(stream: IO[bytes], name: str) -> IO[bytes]:
    """The stream, unpacked as the ending of `name` says. Zip archives are not for this function."""
    if name.endswith(".gz"):
        packed = io.BufferedReader(cast(io.RawIOBase, stream), buffer_size=2**20)
        # A server that says "Content-Encoding: gzip" has it unpacked on the way here.
        is_packed = packed.peek(2)[:2] in (GZIP_MAGIC, b"")
        return cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if is_packed else packed
    if name.endswith(".bz2"):
        return bz2.open(stream)
    if name.endswith(".xz"):
        return lzma.open(stream)
    if name.endswith(".zst"):
        return io.BufferedReader(ZstReader(stream), buffer_size=2**20)
    return stream


class ZstReader(io.RawIOBase):
    """All frames of a Zstandard file. zstandard's own reader takes an early end for the end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.frame: zstandard.ZstdDecompressionObj | None = None  # the one that is being read
        self.packed = b""  # read from the stream, belongs to the next frame
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.unpacked:
            packed = self.packed or self.stream.read(ZST_READ_BYTES)
            if not packed:
                if self.frame is not None:
                    raise EOFError("the file ends in the middle of a Zstandard frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.unpacked = memoryview(self.frame.decompress(packed))
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size
