"""Flower's own pieces beside ours: its strategies drive our sites, its plain clients work with our rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmed.engines.local import LocalGrid
from fedmed.errors import FedMedError, UserError
from fedmed.federation.foreign import flower_strategy
from fedmed.federation.records import encode_state
from fedmed.federation.strategy import Strategy
from strategies.server_optimizer import FedAvgM


def plain_app(seen: list[dict[str, Any]] | None = None) -> ClientApp:
    """A client as Flower's tutorials write it: it moves every number towards its own partition id; site k has k + 1 items."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(dict(message.content["config"]))
        target = float(context.node_config["partition-id"])
        state = message.content["arrays"].to_torch_state_dict()
        state = {n: v + (target - v) / 2 if v.is_floating_point() else v + 1 for n, v in state.items()}
        metrics = MetricRecord({"train_loss": target, "num-examples": int(target) + 1})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        value = float(next(iter(state.values())).flatten()[0])
        content = RecordDict({"metrics": MetricRecord({"first": value, "num-examples": 2})})
        return Message(content=content, reply_to=message)

    return app


# ---------------------------------------------------------------------- Flower's strategies, our sites


@pytest.mark.parametrize(
    ("name", "args"), [("FedMedian", {}), ("FedAvg", {"fraction_evaluate": 0.0}), ("FedTrimmedAvg", {"beta": 0.2})]
)
def test_flower_strategy_drives_our_sites(lab: Any, name: str, args: dict[str, Any]) -> None:
    out, summary = lab.run(**{"strategy.name": f"flwr:{name}", "strategy.args": args, "federation.rounds": 2})
    assert [r["round"] for r in lab.history(out, phase="train")] == [1, 2]
    assert all(math.isfinite(r["metrics"]["train_loss"]) for r in lab.history(out, phase="train"))
    assert [r["round"] for r in lab.history(out, phase="evaluate")] == (
        [] if args.get("fraction_evaluate") == 0.0 else [1, 2]
    )
    assert summary["rounds"] == 2
    state = lab.state(out)
    assert state["block1.norm.num_batches_tracked"].dtype == torch.int64
    assert not (out / "checkpoint").exists()


def test_flowers_fedavg_is_ours_up_to_rounding(lab: Any) -> None:
    ours, _ = lab.run(**{"federation.rounds": 2})
    theirs, _ = lab.run(**{"strategy.name": "flwr:FedAvg", "federation.rounds": 2})
    mine, its = lab.state(ours), lab.state(theirs)
    assert list(mine) == list(its)
    for name, value in mine.items():
        torch.testing.assert_close(its[name], value, rtol=1e-4, atol=1e-5)


def test_central_scores_of_a_flower_strategy(lab: Any) -> None:
    derived = {"data.partition.name": "iid", "data.partition.args": {"num_clients": 3}}
    out, summary = lab.run(
        **derived, **{"strategy.name": "flwr:FedAvg", "federation.rounds": 2, "evaluation.central": "auto"}
    )
    assert [r["round"] for r in lab.history(out, phase="central")] == [1, 2]
    assert summary["central"]["last"]["round"] == 2


def test_flower_strategy_errors_come_before_anything_is_written(lab: Any) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "FedMedain": ({}, "no class 'FedMedain'; did you mean 'FedMedian'"),
        "Strategy": ({}, "no class 'Strategy'"),
        "FedAvg": ({"fraction_trian": 1.0}, "FedAvg takes no argument 'fraction_trian'; did you mean 'fraction_train'"),
        "FedAdam": ({"eta": 0.1, "beta": 2}, "FedAdam takes no argument 'beta'"),
    }
    for name, (args, message) in cases.items():
        out = lab.new()
        with pytest.raises(UserError, match=message):
            lab.run(out, **{"strategy.name": f"flwr:{name}", "strategy.args": args})
        assert not out.exists() or not any(out.iterdir())
    with pytest.raises(UserError, match="cannot be resumed"):
        lab.run(options={"resume": True}, **{"strategy.name": "flwr:FedAvg"})


def test_arguments_reach_the_flower_class(lab: Any) -> None:
    built = flower_strategy(lab.config(**{"strategy.name": "flwr:FedAvg", "strategy.args": {"min_train_nodes": 3}}))
    assert built.min_train_nodes == 3  # type: ignore[attr-defined]


def test_a_flower_strategy_whose_sites_all_fail_is_an_error(lab: Any) -> None:
    def fail(call: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(FedMedError, match="gave no model back: every round failed"):
        lab.run(
            options={"intercept": lab.fault(fail, partition=None)},
            **{"strategy.name": "flwr:FedAvg", "federation.rounds": 1},
        )


def test_our_rules_cannot_be_wrapped_and_say_so() -> None:
    with pytest.raises(FedMedError, match=r"cannot be wrapped .* call start\(\)"):
        Strategy().configure_train(1, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- our rules, Flower's plain clients


def test_plain_clients_in_a_run(lab: Any) -> None:
    seen: list[dict[str, Any]] = []
    settings = {"federation.plain_clients": True, "federation.rounds": 2}
    out, summary = lab.run(options={"client_app": plain_app(seen)}, **settings)
    nodes = [f"node-{1000 + i}" for i in range(3)]
    assert [r["site"] for r in lab.history(out, phase="train", round=1)] == nodes
    assert [r["num_examples"] for r in lab.history(out, phase="train", round=1)] == [1, 2, 3]
    assert {(c["round"], c["server-round"], c["rounds"]) for c in seen} == {(1, 1, 2), (2, 2, 2)}
    # w0 -> mean of (w0 + k) / 2 with weights k + 1: w0 / 2 + 4 / 6, twice.
    start = initial_bias(lab)
    torch.testing.assert_close(lab.state(out)["head.bias"], start / 4 + 1.0)
    assert lab.state(out)["block1.norm.num_batches_tracked"].item() == 2
    assert summary["sites"]["node-1000"]["first"] is not None
    assert (out / "checkpoint" / "round-00002" / "model.safetensors").exists()


def initial_bias(lab: Any) -> torch.Tensor:
    from fedmed.federation.site import make_model

    model, _ = make_model(lab.config(), "classification", 6, 3, (16, 16))
    return model.state_dict()["head.bias"]


def test_plain_clients_must_be_asked_for(lab: Any) -> None:
    with pytest.raises(FedMedError, match="did not identify itself"):
        lab.run(options={"client_app": plain_app()})


START = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(0)}


def grid(nodes: int = 3, **options: Any) -> LocalGrid:
    return LocalGrid(plain_app(), nodes, {}, **options)


def test_start_as_flower_calls_it() -> None:
    """`Strategy().start(...)` with Flower's own arguments, no run folder, no configuration."""
    scored: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        scored.append(number)
        return MetricRecord({"sum": float(sum(v.sum() for v in arrays.to_torch_state_dict().values()))})

    result = Strategy().start(grid(), encode_state(START), num_rounds=2, evaluate_fn=evaluate)
    final = result.arrays.to_torch_state_dict()
    torch.testing.assert_close(final["w"], torch.tensor([1.0, 2.0]))
    assert final["n"].item() == 2 and final["n"].dtype == torch.int64
    assert scored == [0, 1, 2]
    assert result.train_metrics_clientapp[1]["train_loss"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert result.evaluate_metrics_clientapp[2]["first"] == pytest.approx(1.0)
    assert result.evaluate_metrics_serverapp[2]["sum"] == pytest.approx(5.0)
    assert START["w"].tolist() == [0.0, 4.0]


def test_start_passes_configuration_on_and_takes_flowers_arrays() -> None:
    seen: list[dict[str, Any]] = []
    over = LocalGrid(plain_app(seen), 2, {}, arrival_seed=3)
    result = Strategy().start(over, ArrayRecord(START), num_rounds=1, train_config=ConfigRecord({"lr": 0.1}))
    assert all(c["lr"] == 0.1 and c["round"] == 1 for c in seen)
    torch.testing.assert_close(result.arrays.to_torch_state_dict()["w"], torch.tensor([0.0, 4.0]) / 2 + 1 / 3)


def test_a_rule_with_memory_starts_the_same_way() -> None:
    """FedAvgM over plain clients: momentum on the floats, counters by maximum."""
    rule = FedAvgM(FedAvgM.Params(lr=1.0, momentum=0.0))
    final = rule.start(grid(), encode_state(START), num_rounds=2).arrays.to_torch_state_dict()
    torch.testing.assert_close(final["w"], torch.tensor([1.0, 2.0]))
    assert final["n"].item() == 2
