"""From a folder to one HTML file: choose the page, render it, write it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.report import figures
from fedmed.report.page.parts import Page

HERE = Path(__file__).resolve().parent
NAME = "report.html"
PATIENTS = "this page holds images of patients: whoever has the file can see them (--no-images leaves them out)"


def write_page(
    folder: Path, out: Path | None = None, images: bool = True, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the page about a run, a demo or a comparison and give its path, by default report.html in the folder.

    `images`: with example cases; without them the page holds aggregates only, and no name of an item in either case. A page with
    images can be read by its owner alone (0600). `say` takes remarks of one line. The same folder gives the same bytes. Raises
    `UserError` when the folder is none of the three.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run or of a comparison")
    target = folder / NAME if out is None else Path(out).expanduser()
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; give the name of a file, such as {target / NAME}")
    if not figures.available():
        say(figures.NO_MATPLOTLIB)
    page = make_page(folder, images)
    try:
        _write(target, render(page), 0o600 if page.patients else 0o644)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror})") from error
    if page.patients:
        say(PATIENTS)
    return target


def make_page(folder: Path, images: bool) -> Page:
    """The content of the page that fits the folder."""
    from fedmed.files import read_json
    from fedmed.report.page.comparison_page import comparison_page
    from fedmed.report.page.demo_page import demo_comparison
    from fedmed.report.page.run_page import run_page

    if (folder / "comparison.json").is_file():
        doc = read_json(folder / "comparison.json")
        if not isinstance(doc, dict) or doc.get("kind") != "comparison":
            raise UserError(f"{folder / 'comparison.json'} is no comparison that `fedmed compare` wrote")
        return comparison_page(folder, doc, images)
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if isinstance(summary, dict) and isinstance(summary.get("arms"), dict):
        return comparison_page(folder, demo_comparison(folder, summary), images)
    return run_page(folder, images)


def render(page: Page) -> str:
    """HTML of a page. Style and script are allowed by their hashes; the page may load nothing else, from nowhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    rules = [
        "default-src 'none'", f"style-src {_hash(style)}", f"script-src {_hash(script)}", "img-src data:",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    values: dict[str, Any] = {"page": page, "style": style, "script": script, "policy": Markup("; ".join(rules))}
    return environment.get_template("page.html.j2").render(**values)


def _hash(text: str) -> str:
    """How a Content-Security-Policy names the text of a style or script element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path: Path, text: str, mode: int) -> None:
    """Write atomically with the given permissions from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8"
        ) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
