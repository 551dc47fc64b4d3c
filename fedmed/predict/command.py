"""`fedmed predict`: load the model, go through the sources one at a time, write what it predicts, and say what was done."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.data.formats.limits import BadFile
from fedmed.engines.loading import TrainedModel, load
from fedmed.errors import UserError
from fedmed.predict.inputs import PICTURE, SERIES, SITE_FILE, VOLUME, Source, find_sources, real_path
from fedmed.predict.predictor import Predictor
from fedmed.predict.sheet import Sheet
from fedmed.predict.site_files import check_split
from fedmed.predict.work import Work, predict_source
from fedmed.registry import PREPARE, import_attribute

SHEET = "contact.png"
_NAMES = {PICTURE: "picture", VOLUME: "volume", SERIES: "DICOM series", SITE_FILE: "site file"}
_SHOWN = 12  # reasons


@dataclass(frozen=True)
class Request:
    """What is asked for.

    run: folder of a trained run; inputs: files and folders; out: folder of the outputs, None: predictions/<name of the run>; site, state, which:
    as `fedmed.load`; split: of site files; size (height, width), fit, window (centre, width): instead of what the import did; force: write
    into a folder that is not empty.
    """

    run: str
    inputs: Sequence[str]
    out: str | None = None
    site: str | None = None
    state: str | None = None
    split: str = "test"
    which: str = "last"
    probabilities: bool = False
    with_patient: bool = False
    batch_size: int = 16
    size: tuple[int, int] | None = None
    fit: str | None = None
    window: tuple[float, float] | None = None
    force: bool = False


def predict(
    request: Request,
    say: Callable[[str], None],
    note: Callable[[str], None],
    step: Callable[[int, int], None] = lambda done, count: None,
    quiet: bool = False,
) -> Path:
    """Predict all inputs and give the folder that holds the outputs (0700: they are patients' data).

    say: takes the result, note: remarks; step: called with the number of sources that are done and that of all. A file that cannot be used is
    counted and skipped. Raises UserError for wrong words, and when nothing could be predicted.
    """
    if request.batch_size < 1:
        raise UserError(f"--batch-size: expected 1 or more, got {request.batch_size}")
    check_split(request.split)
    trained = load(request.run, request.which, request.site, request.state)
    preparation = import_attribute(PREPARE)(trained.facts, request.size, request.fit, request.window)
    out = Path(request.out or Path("predictions") / Path(request.run).expanduser().resolve().name).expanduser()
    _check_out(out, request)
    skipped: Counter[str] = Counter()
    sources = find_sources(request.inputs, skipped, preparation.contrasts, preparation.takes_missing, out)
    if not sources:
        raise UserError(
            "\n".join(["nothing to predict: no picture, volume, DICOM series or site file", *_reasons(skipped)])
        )
    _check_dicom(sources, trained)
    for remark in () if quiet else _remarks(sources, preparation, request, out):
        note(f"note: {remark}")
    predictor = Predictor(trained, preparation, request.batch_size)
    sheet = Sheet(predictor, len(sources))
    work = Work(predictor, out, sheet, request.site, request.split, request.probabilities, request.with_patient)
    with _folder(out):
        for number, source in enumerate(sources):
            try:
                predict_source(work, number, source)
            except BadFile as error:
                skipped[str(error)] += 1
            except UserError:
                if source.kind != SITE_FILE or len(sources) == 1:
                    raise
                skipped["an HDF5 file that is no site file for this model (give it alone to see why)"] += 1
            step(number + 1, len(sources))
        if not work.done:
            raise UserError("\n".join(["nothing could be predicted:", *_reasons(skipped)]))
        work.write_table()
        picture = sheet.write(out / SHEET)
    for line in () if quiet else _lines(work, picture, skipped):
        say(line)
    say(f"wrote {out}")
    return out


def _check_out(out: Path, request: Request) -> None:
    """Refuse a folder of outputs that is in use, or in which inputs could be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder, found a file")
    if out.is_dir() and any(out.iterdir()) and not request.force:
        raise UserError(f"--out {out} is not empty; --force writes into it, or choose another folder")
    target, several = real_path(out), len(request.inputs) > 1
    for one in request.inputs:
        path = real_path(Path(one).expanduser())
        used = [path.parent] if path.is_file() else [path, path.parent] if several else [path]
        if target in used:  # outputs of one of several folders lie in a folder of its name
            raise UserError(f"--out {out} is the folder of an input; choose another one")


def _check_dicom(sources: Sequence[Source], trained: TrainedModel) -> None:
    """Say before anything is read that DICOM masks cannot be written here."""
    needed = trained.task == "segmentation" and any(source.kind == SERIES for source in sources)
    if needed and importlib.util.find_spec("highdicom") is None:
        raise UserError(
            "masks of DICOM series are DICOM Segmentations, which need highdicom; pip install 'fedmed[dicom]'"
        )


def _remarks(sources: Sequence[Source], preparation: Any, request: Request, out: Path) -> list[str]:
    """What may be otherwise than the user thinks."""
    kinds = {source.kind for source in sources}
    images = kinds - {SITE_FILE}
    height, width = preparation.size
    found = []
    if images and not preparation.made_of and request.size is None:
        found.append(
            f"the run does not say how its images were prepared; they are brought to {height} x {width} by {preparation.fit} "
            "(--size, --fit and --window say otherwise)"
        )
    for kind in sorted(images - {preparation.made_of}) if preparation.made_of else ():
        found.append(
            f"the model was trained on {_plural(preparation.made_of)}; each {_NAMES[kind]} is prepared by the default rules"
        )
    if request.window is not None and not images & {VOLUME, SERIES}:
        found.append("--window is of volumes and DICOM series; there are none")
    if out.is_dir() and any(real_path(Path(one).expanduser()) in real_path(out).parents for one in request.inputs):
        found.append(f"{out} lies in a folder that is predicted; what was in it before is left out")
    return found


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder of outputs, 0700; one that was made here and stayed empty is taken away again."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        if made:
            out.chmod(0o700)
        yield
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or type(error).__name__}") from error
    finally:
        with contextlib.suppress(OSError):
            if made and not any(out.iterdir()):
                out.rmdir()


def _plural(kind: str) -> str:
    name = _NAMES[kind]
    return name if name.endswith("series") else f"{name}s"


def _lines(work: Work, picture: Path | None, skipped: Counter[str]) -> list[str]:
    """What was done: a line per kind, the values of a mask, files that were skipped, and the sheet."""
    lines = []
    for (kind, ending), count in sorted(work.done.items()):
        name = _NAMES[kind] if count == 1 else _plural(kind)
        images = f" ({work.images[kind]} images)" if kind != PICTURE else ""
        lines.append(f"{count} {name}{images} -> {f'masks ({ending})' if work.segments else work.table}")
    if work.segments:
        lines.append(f"values: {work.values}")
    if any(kind == PICTURE and ending == ".png" for kind, ending in work.done) and work.lossy:
        lines.append(f"masks of {work.lossy} JPEG or BMP pictures are PNG: JPEG would blur them")
    if skipped:
        lines += [f"{skipped.total()} skipped:", *_reasons(skipped)]
    if picture is not None:
        lines.append(f"contact sheet: {picture}")
    return lines


def _reasons(skipped: Counter[str]) -> list[str]:
    common = sorted(skipped.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in common[_SHOWN:])
    return [f"  {count}  {reason}" for reason, count in common[:_SHOWN]] + (
        [f"  {rest}  other reasons"] if rest else []
    )
