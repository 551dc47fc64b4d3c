"""`fedmed data import`: scan a source, read it in parallel, and write the site file, without names and in the same bytes every time."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from data_prep.importers.base import Entry, Header, Skipped
from data_prep.importers.filing import Filing, Plan
from data_prep.importers.ids import Ids, default_key_path, load_key, write_private
from data_prep.importers.options import (
    check_names,
    check_target,
    common_size,
    make_importer,
    parse_size,
    root_attributes,
)
from data_prep.importers.progress import ImportProgress
from data_prep.importers.reading import default_workers, read_in_order, silent_libraries
from data_prep.importers.splits import parse_split, said_splits
from fedmed.errors import UserError

_REASONS_SHOWN = 12
_MOST_SITES = 200
_COLUMNS = ("site", "images", "groups", "train", "val", "test")
_TRACE_COLUMNS = ("item_id", "group_id", "site", "file", "place", "row", "state", "reason")


@silent_libraries()
def import_data(
    format: str,
    source: str,
    out: str,
    words: Sequence[str],
    *,
    size: str | None,
    split: str,
    seed: int,
    secret: str | None,
    trace: str | None,
    compression: int,
    workers: int | None,
    site: str | None,
    force: bool,
    say: Callable[[str], None],
    note: Callable[[str], None],
    quiet: bool,
) -> int:
    """Write the site file `out` from `source` and give the exit code, 0.

    format: registered name of an importer; words: its arguments, KEY=VALUE; size: "128" or "128x160"; split: "70/10/20"; secret: file of the
    key that hashes names; trace: private CSV that lists every file; workers: threads, None: one per CPU; site: name of the only site; say:
    takes the result, note: remarks. Raises UserError for wrong words and where nothing can be imported; then no file is left, but the trace.
    """
    if not source:
        raise UserError("the name of the source is empty; expected a folder or a file ('.' for this folder)")
    target, folder = Path(out).expanduser(), Path(source).expanduser()
    shares, wanted = parse_split(split), parse_size(size)
    _check_numbers(compression, workers, seed)
    importer, params = make_importer(format, folder, words, wanted)
    key = default_key_path() if secret is None else Path(secret).expanduser()
    _check_files(target, key, None if trace is None else Path(trace).expanduser(), folder, force)
    skipped = Skipped()
    header, entries = importer.scan(skipped)
    entries = sorted(entries, key=lambda entry: (entry.site, entry.group, entry.item))
    _check_entries(entries, skipped, site, trace)
    check_names("class", header.classes)
    fixed, remarks = said_splits(entries)
    for remark in (*header.remarks, *remarks):
        note(f"note: {remark}")
    known_size = wanted or common_size(importer, entries)
    attributes = root_attributes(format, params, header, known_size or (0, 0), wanted is not None, split, seed)
    name, named = site or str(header.attrs.get("name") or target.stem), any(entry.site for entry in entries)
    plan = Plan(target, header, attributes, known_size, name, named, fixed, shares, seed, compression)
    records: list[dict[str, Any]] | None = None if trace is None else []
    filing = Filing(plan, _ids(key, note), skipped, records, entries)
    results = read_in_order(importer, header, entries, workers or default_workers(), plan.size)
    try:
        with filing, ImportProgress(len(entries), note, quiet) as progress, closing(results):
            for entry, found in results:
                progress.step(filing.add(entry, found))
            filing.finish()
            _write_trace(trace, records, skipped)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    if not filing.facts:
        raise UserError(_nothing(skipped))
    _report(filing, header, skipped, trace, quiet, say, note)
    say(f"wrote {target}")
    return 0


def _check_numbers(compression: int, workers: int | None, seed: int) -> None:
    if not 0 <= compression <= 9:
        raise UserError(f"--compression: expected 0 (none) to 9, got {compression}")
    if workers is not None and not 1 <= workers <= 256:
        raise UserError(f"--workers: expected 1..256, got {workers}")
    if seed < 0:
        raise UserError(f"--seed: expected a whole number from 0, got {seed}")


def _check_entries(entries: Sequence[Entry], skipped: Skipped, site: str | None, trace: str | None) -> None:
    """Raise UserError where there is nothing to read, or the sites cannot be meant."""
    if not entries:
        _write_trace(trace, [], skipped)
        raise UserError(_nothing(skipped))
    names = {entry.site for entry in entries}
    if len(names) > _MOST_SITES:
        raise UserError(
            f"{len(names)} sites were found, at most {_MOST_SITES} are taken. Does site= name them, or patients?"
        )
    if names != {""} and site is not None:
        raise UserError("--site names the only site of a file, but this source has several; leave it out")
    check_names("site", names - {""} if site is None else [site])


def _check_files(target: Path, key: Path, trace: Path | None, source: Path, force: bool) -> None:
    """Raise UserError where a file exists that must not be replaced, or two of them are the same."""
    check_target(target, source, force, "site file")
    if trace is not None:
        check_target(trace, source, force, "trace")
    paths = [os.path.realpath(path) for path in (target, key, trace) if path is not None]
    if len(set(paths)) < len(paths):
        raise UserError("site file, trace and import key: expected three different files")


def _ids(path: Path, note: Callable[[str], None]) -> Ids:
    key, made = load_key(path)
    if made:
        note(
            f"note: made the import key {path}; keep it, and keep it here: with it the same names give the same ids again"
        )
    return Ids(key)


def _write_trace(trace: str | None, records: Sequence[dict[str, Any]] | None, skipped: Skipped) -> None:
    """Write what became of every file, for the site's own use: names stand in it."""
    if trace is None or records is None:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, _TRACE_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    known = {(record["file"], record["reason"]) for record in records if record["state"] == "skipped"}
    for file, reason in skipped.files:
        if (file, reason) not in known:
            writer.writerow({"file": file, "state": "skipped", "reason": reason})
    write_private(Path(trace).expanduser(), text.getvalue().encode("utf-8", "backslashreplace"), "trace")


def _reasons(skipped: Skipped) -> list[str]:
    common = skipped.reasons.most_common()
    common.sort(key=lambda pair: (-pair[1], pair[0]))
    width = len(str(common[0][1])) if common else 1
    lines = [f"  {count:{width}}  {reason}" for reason, count in common[:_REASONS_SHOWN]]
    rest = sum(count for _, count in common[_REASONS_SHOWN:])
    return lines + ([f"  {rest:{width}}  other reasons"] if rest else [])


def _nothing(skipped: Skipped) -> str:
    if not skipped:
        return "nothing to import: the source holds no file of this kind"
    return "\n".join([f"nothing could be imported, {len(skipped)} files were skipped:", *_reasons(skipped)])


def _report(
    filing: Filing, header: Header, skipped: Skipped, trace: str | None, quiet: bool, say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:  # fmt: skip
    if not quiet:
        for line in _table(filing.facts):
            say(line)
        say(f"{header.task}, classes: {', '.join(header.classes)}")
    if filing.single:
        note(f"note: all images are of one group at {', '.join(filing.single)}, so all of them are in train")
    if skipped:
        which = f"{trace} lists which" if trace else "--trace FILE lists which"
        note(f"{len(skipped)} {'file' if len(skipped) == 1 else 'files'} skipped ({which}):")
        for line in _reasons(skipped):
            note(line)


def _table(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per site, columns aligned on the left as in the other tables of `fedmed data`, whose module would load torch."""
    lines = [_COLUMNS, *(tuple(str(site[key]) for key in _COLUMNS) for site in facts)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    lines.insert(1, tuple("-" * width for width in widths))
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
