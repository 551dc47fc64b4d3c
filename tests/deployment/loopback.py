"""A whole deployment on this machine: a coordinator, sites and runs as processes of their own, with TLS and keys.

Used by the tests of this folder and by `benchmarks/deployment.py`. Everything is done by the commands a user types.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from fedmed.data.site_file import SiteFile
from fedmed.engines.flower_internals import free_port

ROOT = Path(__file__).resolve().parents[2]
UP_S, RUN_S = 180.0, 400.0  # for a process to be up, for a run to end; this machine may be busy


def cut(source: Path, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Write one file per site, as a hospital has it, out of the first sites of a file with several; gives name → path."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    with SiteFile.open(source) as opened, h5py.File(source) as several:
        for name, info in zip(names, opened.sites, strict=False):
            files[name] = folder / f"{name}.h5"
            with h5py.File(files[name], "w") as one:
                for key, value in several.attrs.items():
                    one.attrs[key] = value
                for key, value in several[info.group].attrs.items():
                    one.attrs[key] = value
                for key in several[info.group]:
                    several.copy(f"{info.group}/{key}", one)
    return files


def joined(files: Mapping[str, Path], path: Path) -> Path:
    """The same sites in one file, named as the federation names them, for a simulation."""
    with h5py.File(path, "w") as several:
        for index, (name, file) in enumerate(sorted(files.items())):
            with h5py.File(file) as one:
                group = several.create_group(f"site_{index:02d}")
                for key, value in one.attrs.items():
                    (several if key in ROOT_ATTRS else group).attrs[key] = value
                for key in one:
                    one.copy(key, group)
                group.attrs["site_name"] = name
    return path


ROOT_ATTRS = ("task", "classes", "channels", "image_size", "layout_version")


class Process:
    """A command of FedMed that runs; its output is kept in a file and can be waited for."""

    def __init__(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.words, self.log = list(words), log
        self._file = log.open("ab")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "fedmed.cli.main", *words],
            cwd=log.parent, env=dict(env), stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def until(self, pattern: str, timeout_s: float = UP_S, count: int = 1) -> None:
        """Wait until it has said something `count` times. Fails the test at the deadline or when it ends first."""
        deadline = time.monotonic() + timeout_s
        while len(re.findall(pattern, self.text)) < count:
            ended = self.popen.poll() is not None
            assert not ended, (
                f"{self.words} ended with {self.popen.returncode} before {pattern!r}:\n{self.text[-3000:]}"
            )
            assert time.monotonic() < deadline, f"{self.words}: no {pattern!r} in {timeout_s:g} s:\n{self.text[-3000:]}"
            time.sleep(0.1)

    def wait(self, timeout_s: float = RUN_S) -> int:
        """Wait for its end and give the exit code; it is killed at the deadline."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.words} did not end in {timeout_s:g} s:\n{self.text[-3000:]}") from None

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = 40.0) -> int:
        """Ask it to end, as Ctrl-C does."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """Kill it; what it has started must end by itself."""
        self.popen.kill()
        self.popen.wait(10)

    def children(self, pattern: str) -> list[int]:
        """Process ids of its children whose command line matches."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if parent == self.popen.pid and re.search(pattern, line):
                    found.append(int(folder.name))
        return found


@dataclasses.dataclass
class Loopback:
    """The folders of a federation on this machine and its running processes."""

    root: Path
    files: Mapping[str, Path]
    port: int = dataclasses.field(default_factory=free_port)
    processes: list[Process] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = self.root / "home"
        self.home.mkdir(parents=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_", "WANDB_"))}
        self.env = {**kept, "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache"), "OMP_NUM_THREADS": "1"}
        self.env["PYTHONPATH"] = str(ROOT)
        self.coordinator_dir = self.root / "coordinator"

    # ------------------------------------------------------------------ commands

    def do(self, *words: str, code: int | None = 0, timeout_s: float = UP_S) -> str:
        """Run a command to its end and give all it says; `code`: the exit code it must have."""
        done = subprocess.run(
            [sys.executable, "-m", "fedmed.cli.main", *words],
            env=self.env, cwd=self.root, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        text = done.stdout + done.stderr
        assert code is None or done.returncode == code, f"{words} ended with {done.returncode}:\n{text[-3000:]}"
        return text

    def begin(self, name: str, *words: str, env: Mapping[str, str] | None = None) -> Process:
        """Start a command that goes on; `name` is that of its log."""
        process = Process(words, self.root / f"{name}.log", {**self.env, **(env or {})})
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End everything, the newest first."""
        for process in reversed(self.processes):
            with contextlib.suppress(Exception):
                process.stop(timeout_s=20.0)
        self.processes.clear()

    # ------------------------------------------------------------------ setting up

    def init(self) -> None:
        """Make the coordinator's folder."""
        self.do(
            "coordinator", "init", str(self.coordinator_dir), "--host", "localhost,127.0.0.1", "--port", str(self.port)
        )

    def start_coordinator(self) -> Process:
        """Start the coordinator and wait until it is up."""
        process = self.begin("coordinator", "coordinator", "start", str(self.coordinator_dir), "--bind", "127.0.0.1")
        process.until(r"\bup;", count=len(re.findall(r"\bup;", process.text)) + 1)
        return process

    def make_site(self, name: str, *, approve: bool = True, **settings: Any) -> Path:
        """Make a site's key and site.yaml; `settings` are further keys of it. Gives the path of site.yaml."""
        folder = self.root / "sites" / name
        self.do("site", "keygen", str(folder), "--name", name)
        (folder / "ca.crt").write_bytes((self.coordinator_dir / "ca.crt").read_bytes())
        values = {
            "name": name, "data": str(self.files[name]), "coordinator": f"localhost:{self.port}", "ca": "ca.crt",
            "key": "site.key", "state": "state", "device": "cpu", **settings,
        }  # fmt: skip
        (folder / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
        if approve:
            public = next(folder.glob("*.pub"))
            self.do("coordinator", "approve", str(public), "--name", name, "--dir", str(self.coordinator_dir))
        return folder / "site.yaml"

    def start_site(self, name: str, *, wait: bool = True, env: Mapping[str, str] | None = None) -> Process:
        """Start a site and wait until it is connected."""
        process = self.begin(f"site-{name}", "site", "start", str(self.root / "sites" / name / "site.yaml"), env=env)
        if wait:
            process.until(
                "connected to the coordinator", count=len(re.findall("connected to the coordinator", process.text)) + 1
            )
        return process

    def start_all(self, **settings: Any) -> dict[str, Process]:
        """Coordinator and all sites; gives the sites' processes by name."""
        self.init()
        self.start_coordinator()
        for name in self.files:
            self.make_site(name, **settings)
        found: dict[str, Process] = {}
        threads = [threading.Thread(target=lambda n=name: found.update({n: self.start_site(n)})) for name in self.files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == set(self.files), f"only {sorted(found)} came up"
        return dict(sorted(found.items()))

    # ------------------------------------------------------------------ runs

    def run_words(self, out: Path, experiment: str, *overrides: str) -> list[str]:
        """The command line of a run over the sites."""
        return [
            "run", experiment, *overrides, "--engine", "deployment", "--coordinator", str(self.coordinator_dir),
            "--out", str(out), "--quiet",
        ]  # fmt: skip

    def run(self, out: Path, experiment: str, *overrides: str, resume: bool = False, code: int = 0) -> Process:
        """Run to the end."""
        process = self.begin_run(out, experiment, *overrides, resume=resume)
        found = process.wait()
        assert found == code, f"the run ended with {found}, expected {code}:\n{process.text[-4000:]}"
        return process

    def begin_run(self, out: Path, experiment: str, *overrides: str, resume: bool = False) -> Process:
        """Start a run."""
        return self.begin(out.name, *self.run_words(out, experiment, *overrides), *(["--resume"] if resume else []))

    def simulate(self, out: Path, experiment: str, *overrides: str) -> None:
        """The same on the local engine, over one file with all sites."""
        data = self.root / "all.h5"
        if not data.exists():
            joined(self.files, data)
        self.do(
            "run", experiment, *overrides, f"data.path={data}", "data.partition=null", "data.corruption=null",
            "evaluation.central=none", "--out", str(out), "--quiet", timeout_s=RUN_S,
        )  # fmt: skip


@contextlib.contextmanager
def loopback(root: Path, files: Mapping[str, Path]) -> Iterator[Loopback]:
    """A federation whose processes end with the block."""
    federation = Loopback(root, files)
    try:
        yield federation
    finally:
        federation.close()


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = UP_S) -> None:
    """Wait for something. Fails the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.1)
