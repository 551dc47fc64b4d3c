"""Configuration: defaults, inheritance, overrides, round trips, and errors that name the nearest valid name."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedmed.config import (
    Config,
    config_hash,
    experiment_dirs,
    find_experiment,
    folder_name,
    from_run_config,
    from_tree,
    from_yaml,
    load_config,
    nearest,
    params_from,
    to_tree,
    to_yaml,
)
from fedmed.errors import UserError


def yaml(folder: Path, **files: str) -> Path:
    """Write experiments; gives the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


# ---------------------------------------------------------------------- wrong keys and values

WRONG = [
    ({"federation.round": 3}, "unknown key 'federation.round'; did you mean 'rounds'?"),
    ({"federatoin": {}}, "unknown key 'federatoin'; did you mean 'federation'?"),
    ({"zzz": 1}, "unknown key 'zzz'; known: client, data"),
    ({"data.partition.nam": "iid"}, "unknown key 'data.partition.nam'; did you mean 'name'?"),
    ({"client.porx": {"enabled": True}}, "unknown key 'client.porx'; did you mean 'prox'?"),
    ({"client.prox": True}, "client.addons.prox: expected"),
    ({"federation.rounds": "many"}, "federation.rounds: expected int, got 'many' (str)"),
    ({"federation.rounds": 2.5}, "federation.rounds: expected int, got 2.5 (float)"),
    ({"federation.rounds": True}, "federation.rounds: expected int, got True (bool)"),
    ({"federation.rounds": None}, "federation.rounds: expected int, got None"),
    ({"federation": 3}, "federation: expected FederationConfig, got 3 (int)"),
    ({"optimizer.lr": "fast"}, "optimizer.lr: expected float, got 'fast'"),
    ({"optimizer.lr": False}, "optimizer.lr: expected float, got False"),
    ({"optimizer.persist": "yes"}, "optimizer.persist: expected bool, got 'yes'"),
    ({"data.mean": 0.5}, "data.mean: expected list[float], got 0.5"),
    ({"data.mean": [0.5, "x"]}, "data.mean[1]: expected float, got 'x'"),
    ({"data.augment": "hflip"}, "data.augment: expected list[str], got 'hflip'"),
    ({"model.args": [1]}, "model.args: expected dict[str, typing.Any], got [1]"),
    ({"name": [1]}, "name: expected str, got [1]"),
    ({"optimizer.name": "adamm"}, "optimizer.name: expected one of sgd, adam, adamw, got 'adamm'; did you mean 'adam'?"),
    ({"evaluation.mode": "affter"}, "did you mean 'after'?"),
    ({"engine.name": "rai"}, "did you mean 'ray'?"),
    ({"federation.rounds": 0}, "federation.rounds: expected a value > 0, got 0"),
    ({"federation.fraction": 1.5}, "federation.fraction: expected a value <= 1.0, got 1.5"),
    ({"federation.quorum": -0.1}, "federation.quorum: expected a value >= 0, got -0.1"),
    ({"seed": -1}, "seed: expected a value >= 0, got -1"),
    ({"optimizer.lr": 0}, "optimizer.lr: expected a value > 0, got 0"),
    ({"optimizer.lr": float("nan")}, "optimizer.lr: expected a value > 0, got nan"),
    ({"optimizer.momentum": -0.5}, "optimizer.momentum: expected a value >= 0"),
    ({"optimizer.betas": [0.9]}, "optimizer.betas: expected two values >= 0 and < 1, got [0.9]"),
    ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas: expected two values"),
    ({"training.max_steps": 0}, "training.max_steps: expected a value > 0"),
    ({"data.resize": -4}, "data.resize: expected a value > 0"),
]  # fmt: skip


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


@pytest.mark.parametrize(("flat", "message"), WRONG, ids=[f"{k}={v}" for flat, _ in WRONG for k, v in flat.items()])
def test_wrong_keys_and_values(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        from_tree(nested(flat))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"strategy.name": "fednoro"}, "no site sends a model, strategy 'fednoro' would have nothing to work with"),
        ({"strategy.name": "flwr:FedMedian"}, "set strategy.name=fedavg strategy.args=null"),
        ({"federation.plain_clients": True}, "set federation.plain_clients=false"),
    ],
)
def test_what_local_only_cannot_go_with(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^federation.local_only: .*{re.escape(message)}"):
        from_tree(nested({"federation.local_only": True, **flat}))
    assert from_tree(nested({"federation.local_only": True})).federation.local_only and from_tree(nested(flat))


def test_harmless_conversions() -> None:
    config = from_tree(
        nested({"optimizer.lr": 1, "name": 12, "data.mean": (1, 0.5), "seed": 0, "federation.quorum": 0})
    )
    assert (config.optimizer.lr, config.name, config.data.mean) == (1.0, "12", [1.0, 0.5])
    assert type(config.optimizer.lr) is float


def test_null_clears_what_was_inherited() -> None:
    config = from_tree(
        {"federation": None, "strategy": {"name": "fedavg", "args": None}, "data": {"corruption": None}, "client": None}
    )
    assert config == from_tree({"strategy": {"name": "fedavg"}})


@dataclass(frozen=True)
class Params:
    alpha: float = 1.0
    names: tuple[str, ...] = ()
    limit: int | None = None
    either: int | str = 0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha >= 0 expected, got {self.alpha}")


def test_arguments_of_a_method() -> None:
    made = params_from(Params, {"alpha": 2, "names": ["a"], "limit": 3, "either": "x"}, "strategy.args")
    assert made == Params(2.0, ("a",), 3, "x")
    for args, message in (
        ({"alhpa": 1}, "unknown key 'strategy.args.alhpa'; did you mean 'alpha'?"),
        ({"alpha": -1}, "strategy.args: alpha >= 0 expected, got -1.0"),
        ({"limit": "x"}, "strategy.args.limit: expected int"),
        ({"either": [1]}, "strategy.args.either: expected"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            params_from(Params, args, "strategy.args")


def test_nearest() -> None:
    assert nearest("fedavgg", ["fedavg", "fedadam"]) == "; did you mean 'fedavg'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b" and nearest("x", []) == ""


# ---------------------------------------------------------------------- files, inheritance, overrides


def test_later_files_win(tmp_path: Path) -> None:
    path = yaml(
        tmp_path,
        mine="inherit: [first, second]\nfederation: {rounds: 7}\n",
        first="inherit: root\nseed: 1\nfederation: {rounds: 3, quorum: 0.25}\nmodel: {args: {widths: [4, 4]}}\n",
        second="seed: 2\nmodel: {args: {widths: [8]}}\n",
        root="optimizer: {lr: 0.5}\nseed: 9\n",
    )
    config = load_config(path, ["federation.min_sites=5", "data.augment=[hflip]", "name=other"])
    assert (config.seed, config.federation.rounds, config.federation.quorum) == (2, 7, 0.25)
    assert config.model.args == {"widths": [8]} and config.optimizer.lr == 0.5
    assert (config.federation.min_sites, config.data.augment, config.name) == (5, ["hflip"], "other")
    assert load_config(path).name == "mine"


def test_interpolation(tmp_path: Path) -> None:
    path = yaml(tmp_path, a="seed: 3\nstrategy: {args: {x: '${seed}'}}\n")
    assert load_config(path, ["seed=4"]).strategy.args == {"x": 4}
    with pytest.raises(UserError, match=r"a\.yaml: .*nothing"):
        load_config(yaml(tmp_path, a="seed: '${nothing}'\n"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "inherit: b\n", "b": "inherit: a\n"}, "inherits from itself through a.yaml -> b.yaml"),
        ({"a": "inherit: nobody\n"}, "no experiment 'nobody': neither a YAML file nor a known name"),
        ({"a": "- 1\n- 2\n"}, "expected keys and values at the top level"),
        ({"a": "seed: [1\n"}, "is not valid YAML"),
        ({"a": "inherit: b\nfederation: 3\n", "b": "federation: {rounds: 3}\n"}, "federation"),
    ],
)
def test_broken_files(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(yaml(tmp_path, **files))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rounds", "expected key=value (for example federation.rounds=12), got 'rounds'"),
        ("=3", "expected key=value"),
        ("seed=[1", "cannot read the overrides"),
        ("seed.x=1", "seed"),
        ("federation.rouds=3", "did you mean 'rounds'?"),
        ("strategy=fedavg", "strategy: expected StrategyConfig, got 'fedavg'"),
    ],
)
def test_broken_overrides(word: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config("fedavg", [word])


def test_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no experiment 'fedavgx'.*; did you mean 'fedavg"):
        find_experiment("fedavgx")


def test_every_experiment_loads() -> None:
    folder = experiment_dirs()[0]
    found = [p for p in (*folder.glob("*.yaml"), *folder.glob("data/*.yaml")) if not p.stem.startswith("_")]
    assert len(found) >= 8
    for path in found:
        config = load_config(path)
        assert from_yaml(to_yaml(config)) == config, path


# ---------------------------------------------------------------------- round trips


def test_yaml_round_trip() -> None:
    tree = {
        "name": "größe: x", "data.partition.name": "iid", "data.partition.args": {"num_clients": 3}, "data.mean": [0.5],
        "client.prox": {"enabled": True, "mu": 0.1}, "strategy.args": {"a": None, "b": [1, {"c": 2.5}]},
        "optimizer.lr": 1e-7, "evaluation.select": "bacc", "training.max_steps": 3,
    }  # fmt: skip
    config = from_tree(nested(tree))
    assert config.client.addons == {"prox": {"enabled": True, "mu": 0.1}}
    assert from_yaml(to_yaml(config)) == config
    assert from_tree(to_tree(config)) == config
    assert to_tree(config)["client"]["prox"] == {"enabled": True, "mu": 0.1}
    assert from_yaml(to_yaml(Config())) == Config()


def test_from_flowers_run_config() -> None:
    config = from_run_config(
        {
            "experiment": "fedavg",
            "overrides": 'federation.rounds=3 data.augment="[hflip, vflip]"',
            "config": "",
            "out": "",
        }
    )
    assert config.federation.rounds == 3 and config.data.augment == ["hflip", "vflip"] and config.out == ""
    text = to_yaml(dataclasses.replace(config, seed=5))
    assert from_run_config({"config": text, "experiment": "nobody", "out": "there"}) == dataclasses.replace(
        config, seed=5, out="there"
    )
    assert from_run_config({}).strategy.name == "fedavg"


def test_what_a_checkpoint_is_tied_to() -> None:
    base = from_tree({})
    same = {
        "name": "x", "description": "x", "out": "x", "engine.threads": 2, "tracking.wandb.enabled": True, "data.cache_dir": "x",
        "federation.train_deadline_s": 3, "federation.checkpoint_every": 5, "evaluation.local_only": "x",
    }  # fmt: skip
    for key, value in same.items():
        assert config_hash(from_tree(nested({key: value})), with_rounds=True) == config_hash(base, with_rounds=True), (
            key
        )
    other = {
        "seed": 1, "data.path": "x", "model.args": {"widths": [4]}, "optimizer.lr": 0.5, "client.prox": {"mu": 1.0},
        "strategy.args": {"x": 1}, "training.epochs": 3, "federation.fraction": 0.5,
    }  # fmt: skip
    hashes = {config_hash(from_tree(nested({k: v})), with_rounds=False) for k, v in other.items()}
    assert len(hashes | {config_hash(base, with_rounds=False)}) == len(other) + 1
    longer = from_tree(nested({"federation.rounds": 99}))
    assert config_hash(longer, with_rounds=False) == config_hash(base, with_rounds=False)
    assert config_hash(longer, with_rounds=True) != config_hash(base, with_rounds=True)


def test_folder_names_keep_sites_apart() -> None:
    assert folder_name("site-A_1.b") == "site-A_1.b"
    names = [folder_name(s) for s in ("a/b", "a_b", "a b", "..", ".", "", "A" * 99, "A" * 98, "../../etc")]
    assert len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") or not name for name in names)


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys; from fedmed.config import load_config; load_config('fedavg'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
