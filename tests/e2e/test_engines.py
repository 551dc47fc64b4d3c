"""The ray engine gives the local engine's model, bit for bit, through the command line; one Ray run is fast enough for every test session."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmed.cli.main import main
from fedmed.engines import processes, ray

FEDMED = [sys.executable, "-m", "fedmed.cli.main"]
CLASSIFICATION = [
    "data.path=phantom:classification",
    "data.phantom={num_sites: 2, images_per_site: 40, image_size: 16}",
    "model.args.widths=[4,8]",
    "training.epochs=1",
    "optimizer.persist=true",  # the moments are personal state: they must find their site again in whatever process it runs
    "federation.rounds=2",
]
METHODS = {
    "fednoro": [
        *CLASSIFICATION,
        "data.partition.args.num_clients=2",
        "strategy.args={warmup_rounds: 1, ramp_begin: 1, ramp_end: 2}",
    ],
    "fedbn": CLASSIFICATION,
    "feda3i": [
        "data.phantom={num_sites: 2, images_per_site: 24, image_size: 32}",
        "data.resize=32",
        "data.partition.args.num_clients=3",
        "data.corruption.args={mean_low: 1.0, mean_high: 3.0, std: 1.0, num_shrinkers: 1, clip: 5.0, even_spacing: true}",
        "model.args.base_width=4",
        "training.epochs=1",
        "strategy.args.warmup_rounds=1",
        "federation.rounds=3",
    ],
}


@pytest.fixture
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Derived site files are made once per session, and not in the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def words(name: str, out: Path, engine: str, *more: str) -> list[str]:
    return ["run", name, *METHODS[name], "engine.device=cpu", *more, "--engine", engine, "--out", str(out)]


def history(out: Path) -> list[dict[str, Any]]:
    """Records without the times, which differ."""
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    for record in records:
        record["seconds"] = record["metrics"].pop("seconds", None) is None
    return records


def assert_same_results(first: Path, second: Path) -> None:
    """Same model, same records, same scores of every case, same files at the sites."""
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert history(first) == history(second)
    assert (first / "cases.csv").read_text() == (second / "cases.csv").read_text()
    numbers = [json.loads((out / "summary.json").read_text()) for out in (first, second)]
    for key in ("sites", "mean", "worst", "central", "notes", "noisy_sites", "failures"):
        assert numbers[0][key] == numbers[1][key], key
    trees = [sorted(str(p.relative_to(out)) for p in (out / "sites").rglob("*")) for out in (first, second)]
    assert trees[0] == trees[1]


def assert_nothing_left(out: Path) -> None:
    """The private folder that the log names is gone, and so are its processes."""
    found = re.search(r"installed fedmed-stub to (\S*?/fedmed-[^/]+)/", (out / "ray.log").read_text())
    assert found is not None
    assert not Path(found[1]).exists() and not processes.owned(Path(found[1]))


def test_ray_gives_the_model_of_the_local_engine_and_tells_of_every_round(cached: Path, tmp_path: Path) -> None:
    assert main([*words("fednoro", tmp_path / "local", "local"), "--quiet"]) == 0
    done = subprocess.run(
        [*FEDMED, *words("fednoro", tmp_path / "ray", "ray")], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert_same_results(tmp_path / "local", tmp_path / "ray")
    rounds = re.findall(r"^round (\d)/2  loss [\d.]+  bacc [\d.]+", done.stderr, re.MULTILINE)
    assert rounds == ["1", "2"], done.stderr
    assert "WARNING fedmed.fednoro: round 2: groups" in done.stderr  # what the server app warns of in its own process
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'ray' / 'report.md'}"
    assert "Engine ray" in (tmp_path / "ray" / "report.md").read_text()
    assert_nothing_left(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["feda3i", "fedbn"])
def test_other_methods_are_the_same_on_ray(name: str, cached: Path, tmp_path: Path) -> None:
    for engine in ("local", "ray"):
        assert main(words(name, tmp_path / engine, engine, "seed=5")) == 0
    assert_same_results(tmp_path / "local", tmp_path / "ray")
    assert_nothing_left(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_stopped_on_ray_goes_on_there_to_the_same_end(cached: Path, tmp_path: Path) -> None:
    more = "federation.rounds=12"
    assert main(words("fednoro", tmp_path / "local", "local", more)) == 0
    command = [*FEDMED, *words("fednoro", tmp_path / "ray", "ray", more)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        seen = []
        for line in child.stderr:
            seen.append(line)
            if line.startswith("round 1/12"):
                child.send_signal(signal.SIGINT)
                break
        seen += child.communicate(timeout=120)[1].splitlines()
    assert child.returncode == 130, seen
    assert "go on with" in seen[-2] and seen[-1].endswith("--resume")
    assert not (tmp_path / "ray" / "summary.json").exists()
    assert_nothing_left(tmp_path / "ray")
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    first = int(re.findall(r"going on with round (\d+)", done.stderr)[0])
    assert first > 1
    assert [int(n) for n in re.findall(r"^round (\d+)/12", done.stderr, re.MULTILINE)] == list(range(first, 13))
    assert_same_results(tmp_path / "local", tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.processes
def test_what_only_the_sites_can_refuse_comes_back_as_one_line(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words("fedbn", tmp_path / "ray", "ray", "client.args.loss=bce_dice"), "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "'bce_dice' does not fit classification" in lines[-1] and "all 2 sites" in lines[-1]
    assert_nothing_left(tmp_path / "ray")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("engine.cpus_per_client=9999", "this machine offers"),
        ("engine.gpus_per_client=99", "engine.gpus_per_client=99, but this machine offers"),
        ("engine.device=gpu", "expected auto, cpu, cuda or cuda:N"),
        ("engine.device=cuda:0", "needs a share of a GPU"),
        ("engine.gpus_per_client=-1", "expected a value >= 0"),
        ("data.path=nowhere.h5", "nowhere.h5"),
        ("strategy.args.momentum=0.9", "unknown key 'strategy.args.momentum'"),
        ("strategy.name=fednoro", "use the client of the same method"),
        ("strategy.name=flwr:FedMedain", "did you mean 'FedMedian'?"),
        ("model.name=unett", "did you mean 'unet'?"),
        ("client.args.lose=ce", "client.args.lose"),
        ("evaluation.select=dice", "not scored by 'dice'"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_started(
    setting: str, says: str, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words("fedbn", out, "ray", setting)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and says in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not out.exists() or not any(out.iterdir())  # so the same command with the mistake mended works


def test_a_gpu_that_clients_will_not_use_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedmed.config import Config, EngineConfig
    from fedmed.errors import UserError

    def check(**settings: Any) -> list[str]:
        caplog.clear()
        ray.check_gpus(Config(engine=EngineConfig(name="ray", **settings)))
        return [record.getMessage() for record in caplog.records]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "available_gpus", lambda: 1)
    (line,) = check()
    assert "will run on the CPU" in line and "engine.gpus_per_client" in line and "\n" not in line
    assert check(device="cpu") == check(gpus_per_client=0.25) == check(device="cuda:0", gpus_per_client=1.0) == []
    with pytest.raises(UserError, match="numbered from 0"):
        check(device="cuda:1", gpus_per_client=1.0)
    monkeypatch.setattr(ray, "available_gpus", lambda: 0)
    assert check() == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # what the cluster has is not known here
    assert check() == check(gpus_per_client=4.0) == []
