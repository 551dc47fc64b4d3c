"""What a user installs: the wheel, in an environment of its own, away from the project folder."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.phantom={num_sites: 2, images_per_site: 40, image_size: 16}",
    "data.partition.args.num_clients=2",
    "model.args.widths=[4,8]",
    "training.epochs=1",
    "federation.rounds=2",
    "strategy.args={warmup_rounds: 1, ramp_begin: 1, ramp_end: 2}",
    "engine.device=cpu",
]
Call = Callable[..., str]
pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """The wheel of a copy of the project that holds what must stay out of it."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "runs", "demo-report", "build", "dist", "wandb"
    )
    copy = shutil.copytree(ROOT, place / "copy", ignore=left_out)
    (copy / "experiments" / "patients.json").write_text("{}")
    (copy / "experiments" / "sites.h5").write_bytes(b"")
    (copy / "fedmed" / "left.h5").write_bytes(b"")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (place / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(place: Path, wheel: Path) -> Path:
    """A new environment with the wheel; everything else comes from the environment of the tests.

    A folder named in a .pth file is searched, but the .pth files in it are not read: an editable FedMed there stays unseen.
    Flower's programs are found beside the interpreter, so this one gets its own.
    """
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    outer = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (purelib / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    options = ["--no-index", "--no-deps", "--ignore-installed", "--quiet", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(install, check=True, timeout=200)
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.group == "console_scripts":
            program = python.with_name(entry.name)
            program.write_text(
                f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
            )
            program.chmod(0o755)
    return place / "venv"


@pytest.fixture
def call(installed: Path, tmp_path: Path) -> Call:
    """Call a program of the new environment with an empty home, from an empty folder; give what it prints."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    path = os.pathsep.join([str(installed / "bin"), "/usr/bin", "/bin"])
    env = {"PATH": path, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}

    def run(program: str, *arguments: str) -> str:
        command = [str(installed / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_wheel_holds_the_packages_and_experiments_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "fedmed",
        "strategies",
        "clients",
        "data_prep",
    }
    for package in ("fedmed", "strategies", "clients", "data_prep"):
        expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert expected == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}
    experiments = {f"fedmed/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "experiments").rglob("*.yaml")}
    assert {"fedmed/experiments/_base.yaml", "fedmed/experiments/data/fednoro_instance.yaml"} < experiments
    rest = {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
    page = ROOT / "fedmed" / "report" / "page"
    parts = [page / "style.css", page / "script.js", *(page / "templates").glob("*.j2")]
    assert rest == experiments | {p.relative_to(ROOT).as_posix() for p in parts}
    assert [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]
    assert not [n for n in names if "test" in Path(n).name or n.startswith(("tests/", "docs/", "benchmarks/"))]


def test_wheel_lists_and_runs_experiments_on_both_engines(call: Call, installed: Path, tmp_path: Path) -> None:
    code = "import fedmed, strategies, clients, data_prep\nfor m in (fedmed, strategies, clients, data_prep): print(m.__file__)"
    where = [Path(line) for line in call("python", "-c", code).splitlines()]
    assert len(where) == 4 and all(path.is_relative_to(installed) for path in where)
    listed = {line.split()[0] for line in call("fedmed", "list", "experiments").splitlines()}
    assert {"fedavg", "fednoro", "feda3i"} <= listed and not {"_base", "data/fednoro_instance"} & listed

    work = tmp_path / "work"
    (work / "mine.yaml").write_text("inherit: fednoro\n")
    path = where[0].parent / "experiments" / "fednoro.yaml"
    for out, experiment, engine in (
        ("local", "fednoro", "local"),
        ("path", str(path), "local"),
        ("ray", "mine.yaml", "ray"),
    ):
        shown = call("fedmed", "run", experiment, *TINY, "--engine", engine, "--out", out)
        assert shown.splitlines()[-1].endswith(f"{out}/report.md")
    models = [(work / out / "model.safetensors").read_bytes() for out in ("local", "path", "ray")]
    assert models[0] == models[1] == models[2]
    log = (work / "ray" / "ray.log").read_text()
    assert str(ROOT / "fedmed") not in log and "installed fedmed-stub" in log
    assert sorted(p.name for p in work.iterdir()) == ["local", "mine.yaml", "path", "ray"]
    assert (tmp_path / "home" / ".cache" / "fedmed").is_dir() and not (tmp_path / "home" / ".flwr").exists()
