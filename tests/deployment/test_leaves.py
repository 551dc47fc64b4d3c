"""`fedmed site leaves`: the printed list against what the code sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmed.cli.main import main
from fedmed.config import from_tree, load_config
from fedmed.data.phantom import make_phantom
from fedmed.deployment import leaves as module
from fedmed.deployment.leaves import Shape, leaves, metric_names, shape_of
from fedmed.deployment.site_config import Limits, SiteConfig
from fedmed.errors import UserError
from fedmed.federation.client import declared_leaves
from fedmed.federation.messages import Identity, pack
from fedmed.federation.site import Place, Workshop, answer, client_class, make_addons

TINY: dict[str, Any] = {
    "model": {"args": {"widths": [4, 4]}}, "training": {"batch_size": 5}, "engine": {"device": "cpu"},
    "optimizer": {"name": "sgd", "lr": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One classification site of 20 images: 14 to train, 2 to validate, 4 to test."""
    path = tmp_path_factory.mktemp("data") / "site.h5"
    return make_phantom(path, "classification", num_sites=1, images_per_site=20, image_size=16)


def site(data: Path, **limits: Any) -> SiteConfig:
    """A site with these limits."""
    folder = data.parent
    return SiteConfig("A", data, "h:1", folder, folder, folder, limits=Limits(**limits))


def text(config: Any, where: SiteConfig | None = None, **more: Any) -> str:
    """All lines."""
    return "\n".join(leaves(config, where, **more))


@pytest.mark.parametrize("client", ["fednoro", "scaffold", "local_norm", "supervised"])
def test_everything_a_site_sends_is_on_the_list(data: Path, client: str) -> None:
    config = from_tree({**TINY, "client": {"name": client}, "evaluation": {"select": "bacc", "mode": "after"}})
    workshop, place = Workshop(config), Place(data, partition=0)
    env = workshop.env(workshop.data(place))
    head = {"round": 1, "rounds": 2, "evaluate": "after", "personal_round": 0, "durable_round": 0}
    arrays = env.layout.exchanged_state(env.model)
    reply = answer("train", workshop, place, pack(arrays=arrays, config=head))
    listed = text(config, site(data), entries=True)
    metrics = [*reply.metric_records["metrics"]]
    extras = [*reply.array_records["extras"]] if "extras" in reply.array_records else []
    declared = declared_leaves(client_class(config), make_addons(config))
    for name in (*metrics, *extras):
        names = [
            name,
            *(leaf.name for leaf in declared if leaf.covers(name) and not leaf.name.startswith(("test", "val", "n/"))),
        ]
        assert any(word in listed.replace(",", " ").split() for word in names), name
    sent = reply.array_records["arrays"]
    assert f"the model, {len(sent)} entries" in listed and all(f"    {name} " in listed for name in sent)
    numbers = sum(value.numpy().size for value in sent.values())
    size = sum(value.numpy().nbytes for value in sent.values())
    assert f" {numbers:,} numbers, {size / 1e3:.1f} kB" in listed


def test_the_identity_is_listed_field_by_field() -> None:
    full = Identity("A", "t", ("c",), ("r",), (1, 1), "k", 1, groups_left_out=("g",), code_hash="x")
    assert list(module.IDENTITY) == list(full.as_config())


def test_personal_entries_and_case_files_stay(data: Path) -> None:
    listed = text(
        from_tree({**TINY, "client": {"name": "local_norm"}, "optimizer": {"persist": True, "name": "adam"}}),
        site(data),
    )
    leaving, staying = listed.split("STAYS")
    assert "entries of the model" in staying and "running_mean" in staying and "running_mean" not in leaving
    assert "cases.csv" in staying and "the optimiser's moments" in staying
    assert "nothing of the model" in text(from_tree({**TINY, "federation": {"local_only": True}}), site(data))


def test_scores_by_task() -> None:
    expected = {
        "classification": ["acc", "bacc", "auc", "f1"], "multilabel": ["auc", "map", "f1"],
        "segmentation": ["dice", "missed_fraction", "both_empty"],
    }  # fmt: skip
    for task, names in expected.items():
        activation = "sigmoid" if task == "multilabel" else "softmax"
        assert metric_names(Shape(task, ("a", "b", "c"), ("r",), (8, 8), ""), activation, hd95=False) == names


def test_scores_follow_the_evaluation(data: Path) -> None:
    no_scores = from_tree({**TINY, "evaluation": {"sites": False}})
    assert "no scores (evaluation.sites=false)" in text(no_scores, site(data))
    often = text(from_tree({**TINY, "evaluation": {"every": 3, "select": "bacc"}}), site(data))
    assert "after every 3 rounds and the last one" in often and "val/global/bacc" in often
    subsets = text(load_config("passion", ["evaluation.hd95=true"]))
    assert "test-with+T1+FLAIR" in subsets and "test/global/hd95" in subsets


def test_the_sites_limits_judge_the_run(data: Path) -> None:
    config = from_tree({**TINY, "name": "mine"})
    assert "ALLOWED by the limits of site 'A'" in text(config, site(data))
    assert "withheld all the same, for fewer than 3 items: scores and number of val" in text(
        config, site(data, min_count=3)
    )
    assert "REFUSED: site 'A' refuses: a round of 3 steps" in text(config, site(data, max_steps=2))


def test_shapes_come_from_the_site_else_from_the_experiment(data: Path) -> None:
    config = load_config("feda3i", ["data.resize=48"])
    assert shape_of(config, None).image_size == (48, 48) and shape_of(config, None).task == "segmentation"
    assert shape_of(config, site(data)).image_size == (16, 16)
    with pytest.raises(UserError, match=r"give --config SITE\.yaml"):
        shape_of(from_tree(TINY), None)


def test_the_least_count_is_named_with_its_value() -> None:
    listed = text(load_config("fednoro", ["client.args.min_count=7"]))
    assert (
        "class_loss      C numbers: mean training loss by class; NaN: fewer than 7 (client.args.min_count) items of the class"
        in listed
    )


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "leaves", "fednoro", "model.args={widths: [4]}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("experiment fednoro: strategy fednoro, client fednoro\n") and "class_loss" in said
    assert main(["site", "leaves", "fednoroo"]) == 2
    assert "no experiment 'fednoroo'" in capsys.readouterr().err
