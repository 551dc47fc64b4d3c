"""The project folder as a Flower app: the commands of the documentation, run as they stand there, and what `flwr build` bundles."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmed.cli.main import main
from fedmed.engines import processes
from fedmed.engines.flower_internals import QUIET_SWITCHES, free_port, last_json_object

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.phantom.num_sites=4",
    "data.phantom.images_per_site=20",
    "data.phantom.image_size=16",
    "model.args.widths=[4,8]",
    "training.epochs=1",
    "engine.device=cpu",
]


def commands(page: str) -> str:
    """The shell block of a page that holds `flwr run`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if re.search(r"^flwr run ", block, re.MULTILINE)]
    return found


def replaced(text: str, old: str, new: str) -> str:
    """Replace what must be there exactly once."""
    assert text.count(old) == 1, (old, text)
    return text.replace(old, new)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short private folder: Flower's home (the mark of the processes), HOME, and Ray's place, whose sockets bear no long paths."""
    folder = Path(tempfile.mkdtemp(prefix="plain-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield folder
    assert processes.terminate(folder / "flwr") == set()
    shutil.rmtree(folder)


def environment(home: Path) -> dict[str, str]:
    """What a user's shell has, without any of the switches, and with ports and folders nobody else uses."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_", "OMP_", "PYTHONPATH"))}
    env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env["PATH"]])
    env |= {"HOME": str(home), "FLWR_HOME": str(home / "flwr"), "TMPDIR": str(home), "RAY_TMPDIR": str(home)}
    return env | {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }


def test_both_pages_show_the_same_commands_with_all_switches() -> None:
    page = commands("docs/engines.md")
    assert commands("README.md").splitlines() == [line for line in page.splitlines() if not line.startswith("flwr ls ")]
    for name, value in QUIET_SWITCHES.items():
        assert f"{name}={value}" in page


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the SuperLink is looked up in /proc")
def test_the_documented_commands_leave_a_complete_run_folder(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = replaced(commands("docs/engines.md"), "/path/to/fedmed", str(ROOT))
    script = replaced(script, "federation.rounds=2", " ".join(["federation.rounds=2", *TINY]))
    script = replaced(script, "/path/to/results", str(out))
    done = subprocess.run(
        ["bash", "-e", "-c", script], env=environment(home), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = last_json_object(done.stdout)["runs"]
    assert run["status"] == "finished:completed", done.stdout
    assert run["fab-id"] == "fedmed/fedmed"
    assert f"report: {out / 'report.md'}" in done.stdout
    assert [line for line in done.stdout.splitlines() if re.match(r"round 2/2  loss", line)]

    summary = json.loads((out / "summary.json").read_text())
    assert summary["engine"] == "ray" and len(summary["sites"]) == 4 and summary["rounds"] == 2
    for name in (
        "config.yaml",
        "history.jsonl",
        "cases.csv",
        "model.safetensors",
        "model.json",
        "report.md",
        "checkpoint",
    ):
        assert (out / name).exists(), name
    assert len(list((out / "sites").iterdir())) == 4

    words = ["data.path=phantom:classification", "federation.rounds=2", *TINY]
    assert main(["run", "fedavg", *words, "--out", str(tmp_path / "local"), "--quiet"]) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()

    daemons = processes.owned(
        home / "flwr"
    )  # as documented, Flower's SuperLink is still there; ending it ends its helpers
    (superlink,) = [pid for pid in daemons if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(superlink, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while processes.owned(home / "flwr") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes.owned(home / "flwr")


@pytest.mark.slow
@pytest.mark.processes
def test_the_bundle_holds_the_packages_and_experiments_and_nothing_else(home: Path, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "runs", "demo-report", "build", "dist", "wandb"
    )
    copy = shutil.copytree(ROOT, tmp_path / "fedmed", ignore=left_out)
    strays = (
        "patients.json",
        "fedmed/notes.json",
        "experiments/scores.json",
        "runs/a/history.jsonl",
        "wandb/run.yaml",
        "my.yaml",
        "data/x.md",
    )
    for stray in strays:
        (copy / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy / stray).write_text("{}\n")
    build = [str(Path(sysconfig.get_path("scripts")) / "flwr"), "build", "--app", str(copy)]
    done = subprocess.run(
        build, env=environment(home) | QUIET_SWITCHES, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    packages = ("fedmed", "strategies", "clients", "data_prep", "experiments")
    sources = sum(
        p.stat().st_size for name in packages for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".yaml")
    )
    assert bundle.stat().st_size < 1.2 * sources < 10 * 2**20  # a bundle is not compressed; Flower's limit is 10 MiB
    names = set(zipfile.ZipFile(bundle).namelist()) - {"pyproject.toml", ".info/CONTENT", "LICENSE"}
    expected = {
        p.relative_to(ROOT).as_posix()
        for top in ("fedmed", "strategies", "clients", "data_prep")
        for p in (ROOT / top).rglob("*.py")
    }
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "experiments").rglob("*.yaml")}
    assert names == expected
