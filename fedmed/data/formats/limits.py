"""How much of a file is read, and the one error for a file that cannot be used.

A reader compares what a header declares with `Limits` before it decodes anything, so a few bytes cannot ask for all of the memory.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

from fedmed.errors import FedMedError

GIB = 1 << 30


class BadFile(Exception):
    """A file that cannot be used. Its text is a short reason without path, name or anything of the patient, fit for counting."""


@dataclass(frozen=True)
class Limits:
    """What is read at most; anything larger ends in `BadFile` before it is decoded."""

    max_side: int = 65_500  # pixels along an edge, >= 1; a JPEG has no more
    max_pixels: int = 100_000_000  # pixels of one picture, slice or page, >= 1; Pillow ends at 178 956 970
    max_bytes: int = 2 * GIB  # bytes of one image, volume or array in memory, and of a file (HDF5: any), >= 1
    max_pages: int = 65_536  # pages, frames or slices of one file, >= 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")

    def check_plane(self, height: int, width: int) -> None:
        """Raise `BadFile` when a picture of (height, width) pixels is empty or too large."""
        if height < 1 or width < 1:
            raise BadFile(f"{width} x {height} pixels")
        if max(height, width) > self.max_side:
            raise BadFile(f"{width} x {height} pixels, at most {self.max_side} along an edge are read")
        if height * width > self.max_pixels:
            raise BadFile(f"{width} x {height} pixels, at most {self.max_pixels} are read")

    def check_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes of an array of this shape; raises `BadFile` when they are too many."""
        size = prod(int(side) for side in shape) * itemsize
        if min(shape, default=1) < 0 or size > self.max_bytes:
            raise BadFile(
                f"{' x '.join(map(str, shape))} values of {itemsize} bytes, at most {self.max_bytes} bytes are read"
            )
        return size

    def check_pages(self, count: int) -> None:
        """Raise `BadFile` when a file declares too many pages, frames or slices."""
        if count > self.max_pages:
            raise BadFile(f"{count} pages, at most {self.max_pages} are read")


DEFAULT_LIMITS = Limits()


def file_size(path: str | Path, limits: Limits | None) -> int:
    """Bytes of a regular file, at least 1, at most what `limits` say (None: any). A folder, a pipe or a device is never opened: that could wait for ever."""
    info = os.stat(path)  # noqa: PTH116 - on the path of every picture, and a Path costs more than the call
    if not stat.S_ISREG(info.st_mode):
        raise BadFile("not a regular file")
    if info.st_size == 0:
        raise BadFile("empty file")
    if limits is not None and info.st_size > limits.max_bytes:
        raise BadFile(f"file of {info.st_size} bytes, at most {limits.max_bytes} are read")
    return info.st_size


@contextmanager
def bad_file(kind: str) -> Iterator[None]:
    """Turn every failure inside into `BadFile`; kind: what the file was meant to be, such as "picture".

    The libraries raise nearly anything on damaged bytes (OSError, ValueError, KeyError, SyntaxError, struct.error, ...), so all of `Exception`
    is caught; their texts may quote the file and are not repeated.
    """
    try:
        yield
    except (BadFile, FedMedError):
        raise
    except Exception as error:
        raise BadFile(_reason(error, kind)) from error


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error.__context__, BadFile):  # ours, which a library turned into an error of its own
        return str(error.__context__)
    known: tuple[tuple[type[Exception], str], ...] = (
        (FileNotFoundError, "no such file"),
        (PermissionError, "no permission to read the file"),
        (MemoryError, f"not enough memory for this {kind}"),
        (EOFError, "truncated"),
        (zlib.error, f"damaged {kind}"),
    )
    for type_, reason in known:
        if isinstance(error, type_):
            return reason
    return "truncated" if "truncated" in str(error) else f"damaged {kind}"


def write_beside(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path` and put it in place; a failure leaves the old file, if any, and nothing else."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
