"""The comparison file and what becomes of it: checks, order of overrides, folders, levels, variants, hashes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedmed.compare.expand import Options, make_plan
from fedmed.compare.identity import config_hash, data_mark, first_difference
from fedmed.compare.plan import Plan
from fedmed.compare.spec import apply_variant, comparison_files, read_comparison
from fedmed.config import from_yaml, load_config, params_from, to_yaml
from fedmed.errors import UserError
from fedmed.federation.client import declared_leaves
from fedmed.registry import resolve

Make = Callable[..., Plan]


def names(plan: Plan) -> list[str]:
    return [cell.folder for cell in plan.cells]


def change(file: Path, **keys: Any) -> None:
    """Set top-level keys of the comparison file; None removes one."""
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
    tree = {k: v for k, v in {**tree, **keys}.items() if v is not None}
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))


def test_runs_in_order_with_their_commands(plan_of: Make, tmp_path: Path) -> None:
    plan = plan_of("federation.quorum=0.25", data="phantom:classification")
    assert names(plan) == ["easy/plain-0", "easy/plain-1", "easy/prox-0", "easy/prox-1", "told/prox-0"]
    cell = plan.cells[3]
    # file, variant, setting, arm, command line, data, seed: later words win
    phantom = "'data.phantom={num_sites: 2, images_per_site: 20, image_size: 16}'"
    assert cell.command == (
        f"fedmed run fedavg federation.rounds=3 optimizer.lr=0.5 {phantom} training.batch_size=8 optimizer.lr=0.125 training.epochs=4 "
        "client.prox.enabled=true optimizer.lr=0.25 federation.quorum=0.25 data.path=phantom:classification seed=1 "
        f"--out {tmp_path}/out/easy/prox-1"
    )
    config = cell.config
    assert (config.optimizer.lr, config.training.epochs, config.training.batch_size) == (0.25, 4, 8)
    assert (config.seed, config.federation.quorum) == (1, 0.25)
    assert plan.cells[0].config.optimizer.lr == 0.125
    assert config == load_config("fedavg", cell.words)  # also where only the seed was put in
    assert (plan.baseline, plan.variant, plan.metrics, plan.engine) == ("plain", "small", ("bacc", "auc"), "local")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metrics": ["Q:bacc"]}, "'Q:bacc' begins with 'Q'"),
        ({"metrics": ["rare:x"]}, "needs a number of classes"),
        ({"metrics": ["bacc", "bacc"]}, "'bacc' is named twice"),
        ({"seed_metrics": ["acc"]}, "seed_metrics: 'acc' is not among metrics; did you mean 'bacc'"),
        ({"findings": ["nosy"]}, "no finding is called 'nosy'; did you mean 'noisy'"),
        (
            {"arms": {"plain": ["seed=7"]}, "settings": {"easy": {}}, "variants": {}},
            "seed=7: a comparison sets this key",
        ),
        ({"levels": {"values": {"a/b": []}}}, "'easy-a/b' cannot name a folder"),
    ],
)
def test_what_would_show_only_after_the_runs_is_refused_before(
    plan_of: Make, file: Path, keys: dict[str, Any], said: str
) -> None:
    change(file, **keys)
    with pytest.raises(UserError, match=re.escape(said)):
        plan_of()


def test_a_borrowed_baseline(plan_of: Make, tmp_path: Path) -> None:
    plan = plan_of()
    easy, told = plan.settings
    assert (easy.against, told.against, told.arms, told.seeds) == (None, "easy", ("plain", "prox"), (0,))
    assert plan.folder("told", "plain", 0) == tmp_path / "out" / "easy" / "plain-0"
    assert plan.folder("told", "prox", 0) == tmp_path / "out" / "told" / "prox-0"
    assert plan.cell("told", "prox", 1) is None
    assert plan.folder("told", "prox", 1) == tmp_path / "out" / "told" / "prox-1"


def test_variants_and_seeds(plan_of: Make) -> None:
    full = plan_of(variant="full")
    assert names(full) == [f"easy/{arm}-{seed}" for arm in ("plain", "prox") for seed in range(3)]
    assert full.metrics == full.seed_metrics == ("auc",)
    assert len(plan_of(seeds=4).cells) == 9  # told keeps its one
    assert [s.seeds for s in plan_of(seeds=1).settings] == [(0,), (0,)]
    with pytest.raises(UserError, match="did you mean 'small'"):
        plan_of(variant="smal")


def test_a_file_without_variants(file: Path, plan_of: Make) -> None:
    change(file, variants=None)
    plan = plan_of()
    assert plan.variant == "full" and len(plan.cells) == 7  # three seeds, told one
    assert make_plan(str(file), Options()).out == Path("runs/compare/mine-full")


def test_levels(file: Path, plan_of: Make) -> None:
    levels = {"name": "severity", "values": {"1": ["training.epochs=3"], "5": ["training.epochs=4"]}}
    change(file, levels=levels)
    plan = plan_of(seeds=1)
    assert [s.name for s in plan.settings] == ["easy-1", "easy-5", "told-1", "told-5"]
    assert [s.title for s in plan.settings[1:3]] == ["Easy, severity 5", "Told, severity 1"]
    assert plan.settings[3].against == "easy-5"
    assert [c.config.training.epochs for c in plan.cells if c.arm == "prox"] == [3, 4, 3, 4]
    change(file, variants={"small": {"levels": ["5"]}, "big": {"levels": {"values": {"x": ["training.epochs=9"]}}}})
    assert [s.name for s in plan_of().settings] == ["easy-5", "told-5"]
    assert plan_of(variant="big").settings[0].title == "Easy, level x"
    change(file, settings={"easy": {}, "easy-1": {}}, levels={"values": {"1": [], "1-1": []}}, variants=None)
    with pytest.raises(UserError, match="'easy-1-1' like another"):
        plan_of()


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"setings": {}}, "unknown key 'setings'; did you mean 'settings'"),
        ({"base": None}, "mine.yaml: base is missing"),
        ({"metrics": []}, "metrics is missing"),
        ({"arms": {"a b": []}}, "'a b' cannot name a folder"),
        ({"arms": {"plain": ["rounds"]}, "settings": {"easy": {}}}, "arms.plain: expected key=value, got 'rounds'"),
        ({"settings": {"easy": {"titel": "x"}}}, "unknown key 'settings.easy.titel'; did you mean 'title'"),
        ({"settings": {"easy": {"arms": ["plain", "prx"]}}}, "settings.easy.arms: no arm 'prx'; did you mean 'prox'"),
        ({"settings": {"easy": {"arms": ["prox"]}}}, "leaves out the baseline 'plain'"),
        ({"settings": {"easy": {}, "told": {"arms": ["prox"], "against": "esy"}}}, "did you mean 'easy'"),
        ({"settings": {"easy": {"seeds": 0}}}, "settings.easy.seeds: expected a whole number >= 1"),
        ({"variants": {"small": {"settings": ["esy"]}}}, "variants.small.settings: no setting 'esy'"),
        ({"variants": {"small": {"arms": ["prox"]}}}, "variants.small.arms leaves out the baseline"),
        ({"variants": {"small": {"settings": ["told"]}}}, "'told' is against 'easy', which the variant leaves out"),
        ({"variants": {"small": {"levels": ["9"]}}}, "no level '9'"),
        ({"last_rounds": 0}, "last_rounds: expected a whole number >= 1"),
        ({"base": "fedavgg"}, "no experiment 'fedavgg'"),
        ({"data": None}, "names no data of its own"),
        ({"overrides": ["federation.round=3"]}, "setting easy, arm plain: unknown key 'federation.round'"),
    ],
)
def test_files_that_cannot_be_run(file: Path, plan_of: Make, keys: dict[str, Any], text: str) -> None:
    change(file, **keys)
    with pytest.raises(UserError) as error:
        plan_of()
    assert text in str(error.value)


def test_names_and_words_that_are_refused(tmp_path: Path, plan_of: Make) -> None:
    with pytest.raises(UserError, match="did you mean 'label_noise'"):
        make_plan("label_nose", Options())
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        make_plan(str(tmp_path / "broken.yaml"), Options())
    for word, option in (("seed=1", "--seeds"), ("data.path=x", "--data"), ("out=x", "--out")):
        with pytest.raises(UserError, match=option):
            plan_of(word)
    with pytest.raises(UserError, match="expected key=value"):
        plan_of("seed")
    with pytest.raises(UserError, match="belong together"):
        plan_of(engine="deployment")


def test_a_base_beside_the_comparison(file: Path, plan_of: Make) -> None:
    (file.parent / "own.yaml").write_text("inherit: fedavg\n")
    change(file, base="own.yaml")
    assert plan_of().cells[0].command.startswith(f"fedmed run {file.parent}/own.yaml ")


def test_selection(plan_of: Make) -> None:
    plan = plan_of()
    assert plan.select() == {cell.key for cell in plan.cells}
    assert plan.select(only=["told"]) == {("told", "prox", 0), ("easy", "plain", 0)}  # with the baseline it borrows
    assert plan.select(arms=["prox"]) == {("easy", "prox", 0), ("easy", "prox", 1), ("told", "prox", 0)}
    with pytest.raises(UserError, match="no setting 'tld'; did you mean 'told'"):
        plan.select(only=["tld"])
    with pytest.raises(UserError, match="no arm 'fedavg'"):
        plan.select(arms=["fedavg"])
    part = plan.restricted(plan.select(only=["told"]))
    assert [s.name for s in part.settings] == ["told"] and names(part) == ["easy/plain-0", "told/prox-0"]
    assert part.folder("told", "plain", 0) == plan.folder("told", "plain", 0)  # still borrowed
    assert [s.arms for s in plan.restricted(plan.select(arms=["plain"])).settings] == [("plain",)]


def test_hash_of_what_a_run_stores(plan_of: Make, tmp_path: Path) -> None:
    config = plan_of().cells[0].config
    text = to_yaml(config)
    assert config_hash(from_yaml(text)) == plan_of().cells[0].config_hash == config_hash(config)
    assert len(config_hash(config)) == 16
    from fedmed.engines.prepare import with_absolute_paths

    file = dataclasses.replace(
        config, out="there", data=dataclasses.replace(config.data, path="x.h5", cache_dir=str(tmp_path))
    )
    assert config_hash(with_absolute_paths(file)) == config_hash(file) != config_hash(config)
    larger = dataclasses.replace(file, data=dataclasses.replace(file.data, phantom={"image_size": 128}))
    assert config_hash(larger) == config_hash(file)  # no phantom is made
    made = dataclasses.replace(larger, data=dataclasses.replace(larger.data, path="phantom:classification"))
    assert config_hash(made) != config_hash(config)


def test_what_the_hash_leaves_out() -> None:
    plain = load_config("fedavg")
    same = [
        "engine.threads=2",
        "engine.device=cpu",
        "engine.name=ray",
        "tracking.wandb.enabled=true",
        "name=x",
        "out=y",
    ]
    same += ["federation.train_deadline_s=5", "federation.checkpoint_every=3"]
    assert config_hash(load_config("fedavg", same)) == config_hash(plain)
    for word in ("optimizer.lr=0.3", "seed=1", "federation.rounds=11", "engine.precision=bf16", "evaluation.every=2", "engine.name=deployment"):  # fmt: skip
        changed = load_config("fedavg", [word])
        assert config_hash(changed) != config_hash(plain), word
    assert (
        first_difference(plain, load_config("fedavg", ["optimizer.lr=0.3"]))
        == "optimizer.lr is 0.001 there and 0.3 now"
    )
    assert first_difference(plain, load_config("fedavg", same)) == ""
    args = load_config("fedavg", ["strategy.args={x: 1}"])
    assert first_difference(plain, args) == "strategy.args.x is not set there and 1 now"


def test_hash_over_real_sites_knows_no_files() -> None:
    from fedmed.engines.deployment import coordinator_config

    config = load_config("fednoro", ["engine.name=deployment", "data.path=x.h5", "out=there"])
    assert config_hash(coordinator_config(config)) == config_hash(config)


def test_a_configuration_made_from_the_seed(file: Path, plan_of: Make) -> None:
    change(file, overrides=["federation.rounds=${seed}"], settings={"easy": {}}, variants={"small": {"seeds": 2}})
    with pytest.raises(UserError, match="rounds: expected a value > 0"):
        plan_of()  # zero rounds with seed 0
    (file.parent / "own.yaml").write_text(
        "inherit: fedavg\nfederation: {rounds: 7}\nstrategy: {args: {x: '${seed}'}}\n"
    )
    change(file, base="own.yaml", overrides=[], settings={"easy": {}})
    assert [c.config.strategy.args["x"] for c in plan_of().cells] == [0, 1, 0, 1]


def test_mark_of_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    assert data_mark(str(path)) is data_mark("phantom:classification") is data_mark("") is None
    path.write_bytes(b"a" * 3_000_000)
    first = data_mark(str(path))
    path.write_bytes(b"a" * 1_500_000 + b"b" + b"a" * 1_499_999)
    os.utime(path, (1, 1))
    assert first != data_mark(str(path)) is not None


@pytest.mark.parametrize("name", list(comparison_files()))
def test_every_comparison_of_the_project(name: str) -> None:
    """All variants resolve, and every arm names a rule and a client that take their arguments and belong together."""
    known = read_comparison(comparison_files()[name])
    for variant in known.variants:
        apply_variant(known, variant)
        plan = make_plan(name, Options(variant=variant, seeds=1, data="phantom:classification"))
        for cell in plan.cells:
            strategy, client = (
                resolve("strategy", cell.config.strategy.name),
                resolve("client", cell.config.client.name),
            )
            params_from(strategy.Params, cell.config.strategy.args, "strategy.args")
            params_from(client.Params, cell.config.client.args, "client.args")
            addons = {n: resolve("add-on", n) for n in cell.config.client.addons}
            leaves = {leaf.name for leaf in declared_leaves(client, addons)}
            assert not [n for n in strategy.requires if n not in leaves], cell.label
        for cell in make_plan(name, Options(variant=variant, seeds=1, data=known.data)).cells if known.data else ():
            data = cell.config.data  # images are only made smaller, so a phantom must be large enough
            assert (data.resize or 1) <= data.phantom.get("image_size", 64), (variant, cell.label)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "comparing.md"
    (example,) = (
        b for b in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE) if "base:" in b
    )
    (tmp_path / "ours.yaml").write_text(example)
    plan = make_plan(str(tmp_path / "ours.yaml"), Options())
    assert [(s.name, len(s.seeds)) for s in plan.settings] == [("skewed", 3), ("mild", 2)]
    assert len(make_plan(str(tmp_path / "ours.yaml"), Options(variant="full")).cells) == 14
