"""Entries read in parallel and handed on in their order, with few of them in memory, each either as rows or as the reason it cannot be used."""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from data_prep.importers.base import Entry, Header, Importer, Row
from fedmed.data.formats.limits import BadFile
from fedmed.data.site_checks import IMAGE_TYPES

Result = list[Row] | str  # rows, or a reason
_PIXELS = frozenset(np.dtype(name) for name in IMAGE_TYPES)
_LIBRARIES = ("PIL", "pydicom", "nibabel", "nibabel.global", "highdicom", "h5py")
_TOGETHER = 32  # pictures a thread reads before it hands them over: handing over costs as much as checking a picture
_BYTES_TOGETHER = 1 << 23  # of their images, at most, about
OTHER_SIZE = "another size than most images (--size brings all to one)"
_ROWS_AHEAD = 256  # images in memory at most, about; volumes count with all their slices


def read_in_order(
    importer: Importer, header: Header, entries: Sequence[Entry], workers: int, size: tuple[int, int] | None = None
) -> Generator[tuple[Entry, Result], None, None]:
    """Read `entries` in `workers` threads; what comes out is in their order, whatever finishes first.

    Threads, because decoding gives up the interpreter lock; processes would have to send every image through a pipe. At most four entries
    per worker, fewer of volumes, are in memory; where all images have the known `size` (H, W), single ones are read in batches of some MiB.
    Closing the iterator early drops what is not yet begun.
    """
    if workers == 1:
        yield from ((entry, attempt(importer, header, entry, size)) for entry in entries)
        return
    largest = max((entry.rows for entry in entries), default=1)
    window = max(workers + 1, min(4 * workers, _ROWS_AHEAD // max(1, largest)))
    together = 1
    if size is not None and largest == 1:
        together = min(_TOGETHER, 1 + _BYTES_TOGETHER // max(1, size[0] * size[1] * len(header.channels)))
        window = workers + 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="import")
    ahead: deque[tuple[Sequence[Entry], Future[list[Result]]]] = deque()

    def read(batch: Sequence[Entry]) -> list[Result]:
        return [attempt(importer, header, entry, size) for entry in batch]

    try:
        for start in range(0, len(entries), together):
            batch = entries[start : start + together]
            ahead.append((batch, pool.submit(read, batch)))
            if len(ahead) >= window:
                yield from _handed_over(ahead)
        while ahead:
            yield from _handed_over(ahead)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _handed_over(ahead: deque[tuple[Sequence[Entry], Future[list[Result]]]]) -> Iterator[tuple[Entry, Result]]:
    batch, future = ahead.popleft()
    yield from zip(batch, future.result(), strict=True)


def default_workers() -> int:
    """Number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Keep warnings and logs of the libraries that read images off the terminal: they quote what stands in the files."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def attempt(importer: Importer, header: Header, entry: Entry, size: tuple[int, int] | None = None) -> Result:
    """Rows of an entry, checked against the header, or the reason why it cannot be used.

    Everything that goes wrong with one entry stays with it: an import of a million files must not end by the strangest of them. The text of
    an unforeseen error may quote the file and is not repeated.
    """
    try:
        rows = [check_row(row, header) for row in importer.read(entry)]
    except BadFile as error:
        return str(error)
    except Exception as error:
        return f"cannot be read ({type(error).__name__})"
    if size is not None and any(row.arrays["image"].shape[:2] != size for row in rows):
        return OTHER_SIZE  # here, so that no image of a stranger's size waits in memory
    return rows or "no image in it"


def check_row(row: Row, header: Header) -> Row:
    """Check types, shapes and values of a row, so that the file made of such rows can be opened. Raises `BadFile`."""
    image = row.arrays["image"]
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or not image.size:
        raise BadFile("no image of two dimensions")
    if channels != len(header.channels):
        raise BadFile(f"{channels} channels, expected {len(header.channels)}")
    if image.dtype not in _PIXELS:
        raise BadFile(f"pixels of type {image.dtype.name}, which site files do not hold")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise BadFile("pixels that are infinite or no numbers")
    for name, array in row.arrays.items():
        if name == "image":
            continue
        if array.shape[:2] != image.shape[:2]:
            raise BadFile(f"{name} and image differ in size")
        if name in ("mask", "scribble"):
            _check_ids(array, name, header)
    if "label" in row.values and header.task != "segmentation":
        _check_label(np.asarray(row.values["label"]), header)
    return row


def _check_ids(array: np.ndarray, name: str, header: Header) -> None:
    ignore = header.attrs.get(f"ignore_value_in_{name}", header.attrs.get("ignore_value"))
    if ignore is None and name == "scribble":
        ignore = len(header.classes)
    if int(array.max()) < len(header.classes):
        return
    beyond = array[array >= len(header.classes)]
    if ignore is None or (beyond != ignore).any():
        raise BadFile(f"{name} with values that are no class")


def _check_label(label: np.ndarray, header: Header) -> None:
    wanted = (len(header.classes),) if header.task == "multilabel" else ()
    top = 1 if header.task == "multilabel" else len(header.classes) - 1
    if label.shape != wanted or label.dtype.kind not in "biu":
        raise BadFile("label of another shape or type")
    if label.size and (label.min() < 0 or label.max() > top):
        raise BadFile("label that is no class")
