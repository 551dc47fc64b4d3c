"""What travelled: bytes of the model down to and up from each site, from the records and the size of what is exchanged.

Counted are the exchanged entries of the model. Numbers beside it, and arrays of a method's own, are not in the records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.report.page.parts import Block, Cell, Facts, Fold, Row, Table, Text
from fedmed.report.page.run_data import RunData
from fedmed.report.tables import clock
from fedmed.report.values import number

Record = Mapping[str, Any]
_ALL_SITES = "all sites"  # how a Flower strategy's records are filed


def amount(size: float) -> str:
    """Bytes for people: "1.2 MB" (10^6)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return ""


def array_bytes(path: Path) -> int | None:
    """Bytes of the arrays in a safetensors file, from its size and the length of its header; None if it is none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
    except OSError:
        return None
    return size - 8 - header if 0 < header <= size - 8 else None


def exchanged_bytes(run: RunData) -> tuple[int | None, bool]:
    """Bytes of one copy of what is exchanged, and whether that is exact: a checkpoint holds just that, the model file all entries."""
    for path in sorted(run.folder.checkpoint.glob("round-*/model.safetensors"), reverse=True):
        found = array_bytes(path)
        if found is not None:
            return found, True
    return array_bytes(run.folder.model), False


def messages(history: Sequence[Record], mode: str) -> list[tuple[int, str, str, bool, bool]]:
    """Every message that carried a model, as (round, site, phase, came back with a model, failed).

    `mode`: `evaluation.mode`; where scores ride on training, only the separate evaluation after the last round is a message: with
    `before` all records of that round, with `after` the second one of a site.
    """
    found = []
    last = max((int(r["round"]) for r in history), default=0)
    seen: Counter[tuple[int, str]] = Counter()
    for record in history:
        phase, site, round_number = record.get("phase"), record.get("site"), int(record["round"])
        if site is None or site == _ALL_SITES or phase not in ("train", "query", "evaluate"):
            continue
        failed = record.get("status") == "failed"
        if phase == "evaluate" and mode != "separate":
            seen[round_number, site] += 1
            if round_number < last or (mode == "after" and seen[round_number, site] < 2):
                continue
        back = phase == "train" and record.get("status") == "ok"
        found.append((round_number, str(site), str(phase), back, failed))
    return found


def blocks(run: RunData) -> list[Block]:
    """The section on communication."""
    sent = messages(run.history, str(run.setting("evaluation.mode", "separate")))
    size, exact = exchanged_bytes(run)
    down, up = len(sent), sum(back for *_, back, _ in sent)
    failed = [r for r in run.history if r.get("status") == "failed"]
    pairs = [("messages with the model", str(down)), ("updates that came back", str(up))]
    pairs += [("failed or dropped answers", str(len(failed)))]
    if size is not None:
        copies = [("one copy of the model", amount(size)), ("down", amount(size * down)), ("up", amount(size * up))]
        pairs = [*copies, ("together", amount(size * (down + up))), *pairs]
    note = "Counted are the exchanged entries of the model, uncompressed; scores and what a method adds are not."
    if size is None:
        note = "The folder holds no model, so only messages are counted."
    elif not exact:
        note += (
            " The folder holds no checkpoint; the size is that of the whole model, of which some may stay at the sites."
        )
    found: list[Block] = [Facts(pairs), Text(note, "note")]
    if sent:
        found += [_by_site(run, sent, size), Fold("By round", [_by_round(sent, size)])]
    if failed:
        found.append(_failures(failed))
    return found


def _size(size: int | None, copies: int) -> str:
    return "-" if size is None else amount(size * copies)


def _by_site(run: RunData, sent: Sequence[tuple[int, str, str, bool, bool]], size: int | None) -> Table:
    seconds: dict[str, float] = {}
    for record in run.history:
        site, spent = str(record.get("site")), number(record.get("seconds"))
        seconds[site] = seconds.get(site, 0.0) + (0.0 if math.isnan(spent) else spent)
    rows = []
    for site in sorted({s for _, s, *_ in sent}):
        own = [m for m in sent if m[1] == site]
        back, failed = sum(m[3] for m in own), sum(m[4] for m in own)
        cells = [site, str(len(own)), _size(size, len(own)), str(back), _size(size, back), str(failed)]
        rows.append(Row([*cells, clock(seconds.get(site, math.nan))], run.sites.get(site)))
    header = ["site", "models sent", "down", "updates back", "up", "failed", "time"]
    return Table("Messages by site", header, rows, "Time: from asking to the answer, all messages together.")


def _by_round(sent: Sequence[tuple[int, str, str, bool, bool]], size: int | None) -> Table:
    """One row per stretch of rounds that are alike."""
    counts: dict[int, tuple[int, int, int]] = {}
    for round_number, _, _, back, failed in sent:
        down, up, lost = counts.get(round_number, (0, 0, 0))
        counts[round_number] = (down + 1, up + back, lost + failed)
    stretches: list[tuple[int, int, tuple[int, int, int]]] = []
    for round_number, found in sorted(counts.items()):
        if stretches and stretches[-1][2] == found and stretches[-1][1] == round_number - 1:
            stretches[-1] = (stretches[-1][0], round_number, found)
        else:
            stretches.append((round_number, round_number, found))
    rows = [
        Row([str(a) if a == b else f"{a} to {b}", str(down), _size(size, down), str(up), _size(size, up), str(lost)])
        for a, b, (down, up, lost) in stretches
    ]
    header = ["round", "models sent", "down", "updates back", "up", "failed"]
    return Table(
        "Messages of one round",
        header,
        rows,
        "Rounds that are alike share a row; its numbers are those of each of them.",
    )


def _failures(failed: Sequence[Record], most: int = 50) -> Table:
    rows = []
    for record in failed[-most:]:
        *cells, reason = (str(record.get(key) or "-") for key in ("round", "phase", "site", "reason"))
        rows.append(Row([*cells, Cell(reason, "text")]))
    left = f"The last {most} of {len(failed)}." if len(failed) > most else ""
    return Table("Failed and dropped answers", ["round", "phase", "site", "reason"], rows, left)
