"""Check a site file before it is used: all faults at once, in one pass that holds no more than a few megabytes of pixels.

`layout` looks at the frame, `scan` reads the values, `contents`, `classes` and `people` judge them, `show` says it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.checks.classes import check_classes
from data_prep.checks.contents import check_annotations, check_images, check_splits
from data_prep.checks.findings import SEVERITIES, Finding, Findings
from data_prep.checks.layout import Root, read_frames, read_root
from data_prep.checks.people import check_duplicates, check_groups, check_identifiers, check_names
from data_prep.checks.scan import read_site
from data_prep.checks.show import render, site_record
from data_prep.importers.options import check_target
from fedmed.data.site_checks import open_hdf5
from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError
from fedmed.files import write_json

__all__ = ["WITH_ERRORS", "Finding", "Findings", "check_file", "examine"]
WITH_ERRORS = 4  # exit code of a file with errors; wrong words on the command line give 2


def check_file(
    path: str | Path, *, say: Callable[[str], None], json: str | Path | None = None, quiet: bool = False
) -> int:
    """Check a site file, say what was found, and give 0 (no errors) or `WITH_ERRORS`.

    json: file the same goes to. quiet: the findings only, no tables. Raises UserError for what is no site file at all.
    """
    path = Path(path).expanduser()
    if json is not None and path.exists():
        check_target(Path(json).expanduser(), path, True, "findings file")
    root, records, findings = examine(path)
    say(render(path.name, root, records, findings, quiet))
    if json is not None:
        counts = {f"{severity}s": findings.count(severity) for severity in SEVERITIES}
        about = {"kind": "check", "file": path.name, "task": root.task, "classes": root.classes}
        try:
            write_json(Path(json).expanduser(), {**about, **counts, "sites": records, "findings": findings.sorted()})
        except OSError as error:
            raise UserError(f"cannot write the findings file {json}: {error.strerror or error}") from error
    return WITH_ERRORS if findings.count("error") else 0


def examine(path: Path) -> tuple[Root, list[dict[str, Any]], Findings]:
    """Root attributes, one record per site, and everything found. Raises UserError where there is no site to look at."""
    findings, sites = Findings(), []
    with open_hdf5(path) as file:
        root = read_root(file, path, findings)
        for frame in read_frames(file, path, root, findings):
            if not frame.size and not frame.splits:
                continue  # no usable images; said already
            facts = read_site(file, frame, root)
            check_splits(facts, root, findings)
            check_images(facts, root, findings)
            check_annotations(facts, root, findings)
            if not frame.central:
                sites.append(facts)
    check_duplicates(sites, findings)
    check_groups(sites, findings)
    check_classes(sites, root, findings)
    check_identifiers(sites, findings)
    check_names(sites, root.classes or (), findings)
    if not findings.count("error"):
        try:
            SiteFile.open(path).close()
        except UserError as error:  # the reader has the last word
            findings.add("error", "reader", str(error))
    return root, [site_record(facts, root) for facts in sites], findings
