from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fedmed
from fedmed.cli import main as cli
from fedmed.errors import FedMedError, QuorumLost, UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "flwr", "omegaconf", "matplotlib", "numpy", "ray", "monai", "wandb", "yaml", "cryptography")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A small experiment file outside the known folders."""
    path = tmp_path / "small.yaml"
    path.write_text("inherit: _base\ndescription: A small one.\nfederation: {rounds: 2}\n")
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, made_up) -> Any:
    """Stands for `fedmed.engines`: writes a made-up run and notes what it was asked; `error` makes it fail."""
    from fedmed.files import write_json
    from fedmed.report.summary import build_summary

    fake: Any = ModuleType("fedmed.engines")
    fake.calls, fake.error, fake.save, fake.coordinators = [], None, True, []
    fake.__path__ = [str(ROOT / "fedmed" / "engines")]  # its modules are the real ones

    def run(
        config: Any, *, resume: bool = False, callbacks: Any = (), coordinator: str | None = None
    ) -> dict[str, Any]:
        fake.calls.append((config, resume, list(callbacks)))
        fake.coordinators.append(coordinator)
        folder = Path(config.out)
        if fake.save and not resume:
            (folder / "checkpoint").mkdir()
            (folder / "config.yaml").write_text("name: x")
        if fake.error is not None:
            raise fake.error
        level = 0.9 if config.strategy.name == "feda3i" else 0.8
        history = made_up.make_run(folder, made_up.make_history(3, rounds=2, level=level), overlays=0)
        summary = build_summary(folder, history, config)
        write_json(folder / "summary.json", summary)
        return summary

    fake.run = run
    monkeypatch.setitem(sys.modules, "fedmed.engines", fake)
    monkeypatch.setattr(fedmed, "engines", fake, raising=False)
    return fake


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fedmed.cli.main import main\n"
        "codes = [main(['--help']), main(['run', '--help']), main(['coordinator', '-h']), main(['site', '-h']), main(['--version'])]\n"
        f"print('HEAVY', codes, sorted(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "HEAVY [0, 0, 0, 0, 0] []" in done.stderr
    for word in ("run", "list", "demo", "coordinator", "approve", "site", "keygen", "--version"):
        assert word in done.stdout


def test_list_imports_no_torch() -> None:
    code = (
        "import sys; from fedmed.cli.main import main; main(['list']); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "False"
    assert "strategies" in done.stdout and "fedavg" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedmed {fedmed.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fedmed.__version__


def test_run_prints_table_and_report(experiment: Path, engine: Any, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["run", str(experiment), "seed=7", "--engine", "ray", "--out", str(out), "-q"]) == 0
    config, resume, callbacks = engine.calls[0]
    assert (config.seed, config.engine.name, config.out, config.name) == (7, "ray", str(out), "small")
    assert resume is False and callbacks == []
    text = capsys.readouterr()
    assert "site_00" in text.out and "worst" in text.out and f"report: {out / 'report.md'}" in text.out
    assert {"report.md", "summary.json", "cases.csv", "config.yaml"} <= {p.name for p in out.iterdir()}


def test_run_default_folder(experiment: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", str(experiment), "-q"]) == 0
    assert Path(engine.calls[0][0].out).parent == Path("runs")
    assert Path(engine.calls[0][0].out).name.startswith("small-")
    assert cli.main(["run", str(experiment), "-q", "out=here"]) == 0  # the key of the configuration does the same
    assert engine.calls[1][0].out == "here"


def test_full_folder_and_resume(experiment: Path, engine: Any, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["run", str(experiment), "--resume", "--out", str(out)]) == 2
    assert cli.main(["run", str(experiment), "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err
    (out / "checkpoint").mkdir(parents=True)
    assert cli.main(["run", str(experiment), "--out", str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert engine.calls == []
    assert cli.main(["run", str(experiment), "--out", str(out), "--resume", "-q"]) == 0
    assert engine.calls[0][1] is True


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("data.path: no such file"), 2, "error: data.path: no such file\n"),
        (QuorumLost("2 of 6 sites answered"), 3, "error: 2 of 6 sites answered\n"),
        (FedMedError("stopped"), 3, "error: stopped\n"),
        (
            ZeroDivisionError("a\nb"),
            1,
            "internal error: ZeroDivisionError: a b; run again with --debug for the traceback\n",
        ),
        (AssertionError(), 1, "internal error: AssertionError; run again with --debug for the traceback\n"),
    ],
)
def test_exit_codes(
    experiment: Path, engine: Any, tmp_path: Path, capsys, error: Exception, code: int, text: str
) -> None:
    engine.error = error
    out = tmp_path / "out"
    assert cli.main(["run", str(experiment), "--out", str(out), "-q"]) == code
    captured = capsys.readouterr()
    # A run that could not go on, and has a checkpoint, says how to.
    hint = f"go on with:\n  fedmed run {experiment} --out {out} --resume\n" if code == 3 else ""
    assert captured.err == text + hint and captured.out == ""


def test_debug_shows_the_traceback(experiment: Path, engine: Any, tmp_path: Path, capsys) -> None:
    engine.error = ZeroDivisionError("x")
    assert cli.main(["run", str(experiment), "--out", str(tmp_path / "out"), "--debug", "-q"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("internal error: ZeroDivisionError: x\n")


def test_interrupt_says_how_to_go_on(experiment: Path, engine: Any, tmp_path: Path, capsys) -> None:
    engine.error = KeyboardInterrupt()
    out = tmp_path / "with space"
    assert cli.main(["run", str(experiment), "seed=2", "--engine", "local", "--out", str(out), "-q"]) == 130
    err = capsys.readouterr().err
    assert f"fedmed run {experiment} seed=2 --engine local --out '{out}' --resume" in err
    engine.save = False
    assert cli.main(["run", str(experiment), "--out", str(tmp_path / "b"), "-q"]) == 130
    assert "nothing was saved yet" in capsys.readouterr().err


def test_a_deployment(experiment: Path, engine: Any, tmp_path: Path, capsys) -> None:
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    place = tmp_path / "a coordinator"
    CoordinatorFolder.create(place, ["localhost"])
    words = [
        "run",
        str(experiment),
        "data.partition.name=null",
        "--engine",
        "deployment",
        "--coordinator",
        str(place),
        "-q",
    ]
    assert cli.main(words) == 0
    config = engine.calls[0][0]
    assert engine.coordinators == [str(place)] and config.engine.name == "deployment"
    assert Path(config.out).parent == place / "runs" and Path(config.out).name.startswith("small-")
    assert "note: without effect here: data.partition; every site reads" in capsys.readouterr().err
    engine.error = KeyboardInterrupt()
    out = tmp_path / "out"
    assert cli.main([*words, "--out", str(out)]) == 130
    again = f"data.partition.name=null --engine deployment --coordinator '{place}' --out {out} --resume"
    assert again in capsys.readouterr().err
    engine.error = QuorumLost("1 of 3 sites answered")
    assert cli.main([*words, "--out", str(tmp_path / "other")]) == 3
    assert again.replace(str(out), str(tmp_path / "other")) in capsys.readouterr().err


def test_callbacks_are_closed_whatever_happens(
    experiment: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr("fedmed.tracking.progress.ProgressBar.close", lambda self: closed.append("closed"))
    engine.error = RuntimeError("x")
    assert cli.main(["run", str(experiment), "--out", str(tmp_path / "out")]) == 1
    assert closed == ["closed"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run"], "Missing argument 'EXPERIMENT'"),
        (["run", "fedavgg_"], "no experiment 'fedavgg_'"),
        (["run", "{experiment}", "federation.round=3"], "did you mean 'rounds'"),
        (["run", "{experiment}", "rounds"], "expected key=value"),
        (["run", "{experiment}", "--engine", "rey"], "did you mean 'ray'"),
        (["run", "{experiment}", "--engine", "deployment"], "needs --coordinator DIR"),
        (["run", "{experiment}", "--coordinator", "fl"], "--coordinator is for --engine deployment"),
        (["run", "{experiment}", "--engine", "deployment", "--coordinator", "nowhere"], "is no coordinator's folder"),
        (["coordinator", "sart"], "No such command"),
        (["run", "{experiment}", "--fast"], "No such option"),
        (["walk"], "No such command"),
        (["list", "strategy"], "did you mean 'strategies'"),
    ],
)
def test_wrong_words_give_2(experiment: Path, engine: Any, capsys, words: list[str], text: str) -> None:
    assert cli.main([word.format(experiment=experiment) for word in words]) == 2
    captured = capsys.readouterr()
    assert text in captured.err and "Traceback" not in captured.err
    assert engine.calls == []


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedmed.cli.main", "list", "nothing"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: nothing to list")


def demo(tmp_path: Path, *words: str) -> int:
    """Run the demo into `tmp_path/demo`."""
    return cli.main(["demo", "--out", str(tmp_path / "demo"), "-q", *words])


def test_demo_compares_the_arms(engine: Any, tmp_path: Path, capsys) -> None:
    assert demo(tmp_path, "seed=5", "federation.rounds=2") == 0
    first, second = (call[0] for call in engine.calls)
    assert (first.strategy.name, second.strategy.name) == ("fedavg", "feda3i")
    assert first.seed == second.seed == 5
    for section in ("data", "model", "optimizer", "training", "federation", "evaluation", "engine"):
        assert getattr(first, section) == getattr(second, section), section
    assert first.client.args.get("loss") == second.client.args.get("loss")
    text = capsys.readouterr().out
    assert (
        "averaged over the last 2 evaluations: demo_feda3i is better than demo_fedavg by" in text
        and "One seed each" in text
    )
    assert "not shared: demo_fedavg and demo_feda3i differ in client.name: supervised | feda3i" in text
    folder = tmp_path / "demo"
    assert (folder / "report.md").is_file() and (folder / "figures" / "comparison.png").is_file()
    assert (folder / "demo_fedavg" / "report.md").is_file() and (folder / "demo_feda3i" / "summary.json").is_file()
    assert "![comparison](figures/comparison.png)" in (folder / "report.md").read_text()
    assert text.splitlines()[-2:] == [f"report: {folder / 'report.md'}", f"page: {folder / 'report.html'}"]
    content = json.loads((folder / "comparison.json").read_text())
    assert (content["kind"], content["baseline"], content["seeds"]) == ("comparison", "demo_fedavg", [5])
    assert [(c["setting"], c["folder"], c["state"]) for c in content["cells"]] == [
        ("demo", "demo_fedavg", "done"),
        ("demo", "demo_feda3i", "done"),
    ]
    assert [r["arm"] for r in content["results"] if r["best"]] == ["demo_feda3i"] and "Not shared: " in content[
        "description"
    ]
    assert (folder / "report.html").read_text().startswith("<!")
    assert demo(tmp_path) == 2  # full now


def test_demo_with_other_arms(engine: Any, experiment: Path, tmp_path: Path, capsys) -> None:
    assert demo(tmp_path, "--arm", str(experiment), "--arm", "demo_fedavg") == 0
    text = capsys.readouterr().out
    assert "differ in federation.rounds" in text  # said aloud: this comparison is not fair
    assert [call[0].name for call in engine.calls] == ["small", "demo_fedavg"]


def test_demo_keeps_the_whole_command_of_an_arm(engine: Any, experiment: Path, tmp_path: Path) -> None:
    assert demo(tmp_path, "federation.rounds=2", "--arm", str(experiment), "--arm", "demo_fedavg") == 0
    folder = tmp_path / "demo"
    commands = [cell["command"] for cell in json.loads((folder / "comparison.json").read_text())["cells"]]
    assert commands == [
        f"fedmed run {name} federation.rounds=2 --out {folder / arm}"
        for name, arm in ((experiment, experiment.stem), ("demo_fedavg", "demo_fedavg"))
    ]
