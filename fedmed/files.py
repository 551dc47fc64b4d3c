"""Files that are either old or new and never half: atomic text, JSON and CSV. Light: importing this imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError

Record = dict[str, Any]


def write_text(path: Path, text: str) -> Path:
    """Write a text file so that a reader finds either the old content or all of the new; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def json_ready(value: Any) -> Any:
    """Give `value` as plain JSON data: numbers that JSON lacks (NaN, infinities) become None, arrays lists, dataclasses
    and mappings dicts.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_ready({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return [json_ready(v) for v in sorted(value, key=str)]
    if isinstance(value, Iterable) and not hasattr(value, "tolist"):
        return [json_ready(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars too, without importing either
        return json_ready(value.tolist())
    return str(value)


def write_json(path: Path, value: Any) -> Path:
    """Write JSON atomically; NaN and infinities become null."""
    return write_text(path, json.dumps(json_ready(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV atomically; columns are the union of the keys in order of first appearance, missing and
    undefined cells stay empty.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()})
    return write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; is {path.parent} a run folder?") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


def read_history(path: Path) -> list[Record]:
    """Read `history.jsonl` (or the one in a run folder) as a list of records.

    A broken last line is what a killed run leaves and is skipped; a broken line elsewhere raises `UserError`.
    """
    path = path / "history.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; is {path.parent} a run folder?") from error
    except ValueError as error:  # no UTF-8
        raise UserError(f"{path} is not a text file ({error})") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    return records
