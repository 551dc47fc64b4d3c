"""Estimates of what runs cost: sums by hand, what is counted while a site trains, and a real short measurement beside the real run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmed.compare import measuring
from fedmed.compare.cost import Cost, cost_text, count, estimate, evaluations, full_steps, makespan, projected, size
from fedmed.compare.meter import Meter, Sample, metered
from fedmed.compare.plan import Plan
from fedmed.compare.probe import Listener, ProbeRequest, ProbeResult, main, measure, peak_memory, read_result
from fedmed.config import load_config, to_yaml
from fedmed.files import write_json
from fedmed.models.output import Output

Make = Callable[..., Plan]
TINY = [
    "data.phantom={num_sites: 2, images_per_site: 40, image_size: 16}", "model.args.widths=[4,8]", "training.batch_size=4",
    "federation.rounds=3", "engine.device=cpu",
]  # fmt: skip


def test_steps_of_a_round() -> None:
    config = load_config("fedavg", ["training.batch_size=4", "training.epochs=3"])
    assert [full_steps(n, config) for n in (0, 1, 4, 5, 6, 8)] == [
        0,
        0,
        3,
        3,
        6,
        6,
    ]  # a last batch of one item is left out
    assert full_steps(8, load_config("fedavg", ["training.batch_size=4", "training.max_steps=1"])) == 1


def test_a_message_with_all_its_steps() -> None:
    config = load_config("fedavg", ["training.batch_size=4", "training.epochs=2"])
    sample = Sample("train", 1, 7, 1.0, 100, 50, items=10, steps=2, step_s=0.25, forward=10, step_images=8, step_forward=16, step_backward=8)  # fmt: skip
    found = projected(sample, config)
    # 3 batches twice: 4 steps more; 20 images, each twice forward inside the steps, once in a sweep
    assert (found.seconds, found.steps, found.forward, found.backward) == (2.0, 6, 50.0, 20.0)
    assert (found.down, found.up) == (100, 50)
    few = load_config("fedavg", ["training.batch_size=4", "training.epochs=2", "training.max_steps=3"])
    assert projected(sample, few).backward == 12.0  # three full batches
    query = Sample("query", 1, 7, 1.0, down=100, forward=10, items=10)
    assert projected(query, config).forward == 10 and projected(query, config).steps == 0


def test_a_run_put_together(plan_of: Make) -> None:
    cell = plan_of("federation.rounds=5", "training.batch_size=4", "evaluation.every=2", "training.epochs=2").cells[0]
    steps = {"items": 8, "steps": 2, "step_s": 0.5, "step_images": 8, "step_forward": 8, "step_backward": 8}
    train = [Sample("train", r, node, 1.0 + r, 100, 60, **steps) for r in (1, 2) for node in (0, 1)]  # type: ignore[arg-type]
    asked = [Sample("query", 2, node, 0.5, 100, 4, forward=8) for node in (0, 1)]
    scored = [Sample("evaluate", 1, node, 0.25, 100, forward=3) for node in (0, 1)] + [
        Sample("central", 1, -1, 2.0, forward=9)
    ]
    probe = ProbeResult(2, 3.0, 10**6, 0, 2, 0.5, [*train, *asked], scored)
    found = estimate(cell, probe)
    # start 3; five rounds of .5 outside messages; trains of 2 + 1, 3 + 1, then 4 three times, at two sites; one query; evaluations after 2, 4, 5
    assert found.seconds == pytest.approx(3 + 2.5 + 2 * (3 + 4 * 4) + 2 * 0.5 + 3 * (2 * 0.25 + 2.0) + 2.0)
    assert (found.steps, found.backward) == (20, 80) and found.forward == 80 + 8 + 9
    assert (found.down_round, found.up_round) == (100, 60)
    assert (found.down, found.up) == (500 + 100 + 300, 300 + 4)
    assert (found.rounds, found.rounds_seen, found.sites, found.problem) == (5, 2, 2, "")
    always = [dataclasses.replace(s, round=1) for s in asked]
    assert estimate(cell, dataclasses.replace(probe, samples=[*train, *asked, *always])).up == 300 + 5 * 4
    nothing = estimate(cell, ProbeResult())
    assert nothing.steps == 0 and nothing.down == 0


def test_how_often_is_scored() -> None:
    def times(*words: str) -> tuple[int, int]:
        return evaluations(load_config("fedavg", ["federation.rounds=7", *words]))

    assert times() == (7, 7) and times("evaluation.every=3") == (3, 3) and times("evaluation.every=9") == (1, 1)
    assert times("evaluation.sites=false") == (0, 7) and times("evaluation.mode=after") == (1, 7)


def test_time_of_all_runs() -> None:
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0 and makespan([3.0, 1.0], 1) == 4.0 and makespan([], 3) == 0.0


def test_tables_of_cost() -> None:
    costs = [
        Cost("easy", "plain", "a", 2, 5, 5, 90.0, 20, 1234, 80, 1e6, 2e6, 5e6, 10e6, 5e8),
        Cost("easy", "mine", "b", 2, 5, 2, 30.0, 20, 2468, 80, 1e6, 2e6, 5e6, 10e6, 5e8),
        Cost("easy", "bad", "c", problem="no such data"),
    ]
    text = cost_text(costs, {("easy", "plain"): 2, ("easy", "mine"): 1}, 2)
    lines = text.splitlines()
    assert lines[2].split() == ["easy", "plain", "2", "1:30", "500", "MB", "20", "40", "1.23k", "2.47k", "80", "160"]
    assert ["easy", "plain", "1", "MB", "2", "MB", "5", "MB", "10", "MB", "30", "MB"] in [
        line.split() for line in lines
    ]
    assert "no estimate for easy bad: no such data" in lines
    assert "3 runs, 2 at a time: about 2:00" in lines
    assert "easy mine 2 of 5; later ones count like the last" in text and "easy plain 5 of 5" not in text
    assert "3 runs, 1 at a time: about 2:00, without 1 that cannot be" in cost_text(
        costs, {("easy", "plain"): 1, ("easy", "mine"): 1, ("easy", "bad"): 1}, 1
    )
    assert cost_text(costs[2:], {("easy", "bad"): 1}, 1) == "no estimate for easy bad: no such data"


@pytest.mark.parametrize(
    ("number", "shown", "of_bytes"),
    [(0, "0", "0 B"), (999.4, "999", "999 B"), (1000, "1k", "1 kB"), (12345, "12.3k", "12.3 kB"), (999_900, "1000k", "1000 kB"), (4.56e9, "4.56G", "4.56 GB")],
)  # fmt: skip
def test_numbers_for_people(number: float, shown: str, of_bytes: str) -> None:
    assert count(number) == shown and size(number) == of_bytes


def test_counting_passes() -> None:
    meter = Meter(lambda: None)
    network = torch.nn.Linear(3, 2)

    def forward(images: int) -> Output:
        features = network(torch.ones(images, 3))
        output = Output(features * 2, features)
        meter.passed(output, images)
        return output

    with torch.no_grad():
        forward(5)
    kept = forward(2)
    kept.logits.sum().backward()  # type: ignore[no-untyped-call]
    for _ in range(3):
        with meter.step(4):
            forward(4)
            output = forward(4)
            (output.logits.sum() + output.features.sum()).backward()  # type: ignore[union-attr]
            time.sleep(0.001)
    sample = meter.sample("train", 1, 0, 1.0)
    assert (sample.forward, sample.backward) == (7, 2)
    assert (sample.steps, sample.step_images, sample.step_forward, sample.step_backward) == (3, 12, 24, 12)
    assert sample.step_s >= 0.001
    meter.reset()
    assert meter.sample("train", 1, 0, 1.0) == Sample("train", 1, 0, 1.0)


def test_the_estimate_is_what_the_run_does(tmp_path: Path, plan_of: Make) -> None:
    """Steps, passes and bytes of a real run, counted message by message, beside the estimate from a few of its steps."""
    from fedmed.engines import run

    config = load_config(
        "fedavg", [*TINY, "data.path=phantom:classification", "client.prox.enabled=true", "training.epochs=2"]
    )
    request = ProbeRequest(to_yaml(config), time.time(), steps=2, budget_s=0.0)
    probe = measure(request, tmp_path / "probe")
    assert probe.sites == 2 and probe.rounds == 2 and 0 < probe.startup_s < 100 and probe.memory > 10**7
    assert [s.steps for s in probe.samples] == [2] * 4 and {s.kind for s in probe.samples} == {"train"}
    assert [s.kind for s in probe.scored] == ["evaluate", "evaluate"]
    cell = dataclasses.replace(plan_of().cells[0], config=config)
    found = estimate(cell, probe)

    meter = Meter(lambda: None)
    listener = Listener(meter, 99, 1e9)
    with metered(config, meter):
        run(dataclasses.replace(config, out=str(tmp_path / "run")), callbacks=[listener], intercept=listener)
    real = listener.samples
    assert found.steps * 2 == sum(s.steps for s in real) > 40
    assert found.backward * 2 == sum(s.step_backward + s.backward for s in real)
    # The last evaluation, which also looks at examples for the report, is taken to be like the first.
    last = [s for s in real if s.kind == "evaluate" and s.round == 3]
    extra = sum(s.forward for s in last) - sum(s.forward for s in probe.scored)
    assert found.forward * 2 == sum(s.step_forward + s.forward for s in real) - extra and 0 <= extra < 10
    assert found.down * 2 == sum(s.down for s in real) and found.up * 2 == sum(s.up for s in real) > 0
    from fedmed.federation.checkpoint import read_safetensors

    state = read_safetensors(tmp_path / "run" / "model.safetensors")
    assert found.up_round == sum(v.numel() * v.element_size() for v in state.values())
    from fedmed.federation import site

    assert site.build_model.__name__ == "build_model"  # everything was put back


def test_what_a_probe_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ProbeResult(2, 1.0, 3, 4, 5, 0.5, [Sample("train", 1, 0, 1.0)], [Sample("central", 1, -1, 2.0)])
    monkeypatch.setattr("fedmed.compare.probe.measure", lambda request, folder: result)
    write_json(tmp_path / "request", ProbeRequest("name: x", 0.0))
    assert main(tmp_path / "request", tmp_path / "result") == 0 and read_result(tmp_path / "result") == result
    monkeypatch.undo()
    write_json(tmp_path / "request", ProbeRequest("seed: x", 0.0))
    assert main(tmp_path / "request", tmp_path / "none") == 2
    assert capsys.readouterr().err.startswith("error: seed: expected int") and not (tmp_path / "none").exists()
    assert peak_memory() > 10**7


class FakeChild:
    """A measurement that is over at once with some exit code."""

    def __init__(self, code: int | None, command: list[str]) -> None:
        self.code, self.killed = code, False
        if code == 0:
            write_json(Path(command[-1]), ProbeResult(sites=2, rounds=1))

    def poll(self) -> int | None:
        """The exit code."""
        return -9 if self.killed else self.code

    def kill(self) -> None:
        """Noted."""
        self.killed = True

    def reason(self) -> str:
        """The last line counts."""
        return "it ended with exit code 2\nerror: the masks are missing"


def test_measuring_what_is_not_known(plan_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(seeds=2)
    keys = [("easy", "prox", 1), ("told", "prox", 0), ("easy", "plain", 0)]
    cells = measuring.to_measure(plan, keys, [])
    assert [c.folder for c in cells] == ["easy/plain-0", "easy/prox-0", "told/prox-0"]
    known: dict[str, Any] = {"setting": "told", "arm": "prox", "config_hash": cells[2].config_hash, "problem": ""}
    assert len(measuring.to_measure(plan, keys, [known])) == 2
    assert len(measuring.to_measure(plan, keys, [{**known, "problem": "x"}])) == 3
    assert len(measuring.to_measure(plan, keys, [{**known, "config_hash": "other"}])) == 3

    made: list[FakeChild] = []
    codes = [0, 2, None]

    def start(command: list[str], log: Path, environment: dict[str, str]) -> FakeChild:
        assert environment["TMPDIR"] == str(log.parent)
        made.append(FakeChild(codes[len(made)], command))
        return made[-1]

    monkeypatch.setattr(measuring, "start_child", start)
    monkeypatch.setattr(measuring, "TICK_S", 0.0)
    monkeypatch.setattr(measuring, "LIMIT_S", 0.05)
    said: list[str] = []
    twice = dataclasses.replace(cells[0], setting="same")
    found = measuring.measure_all([*cells, twice], 1, said.append)
    assert said[0] == "measuring 1/3: easy plain" and len(made) == 3 and made[2].killed
    assert [c.problem for c in found] == ["", "the masks are missing", "not measured within 0.05 s", ""]
    assert [(c.setting, c.arm) for c in found] == [
        ("easy", "plain"),
        ("easy", "prox"),
        ("told", "prox"),
        ("same", "plain"),
    ]
