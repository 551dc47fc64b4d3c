"""A site's limits against hand-made configurations, and what is taken out of replies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import MetricRecord, RecordDict

from fedmed.config import Config, from_tree, load_config, to_yaml
from fedmed.deployment.limits import check, is_by_group, least_counts, read_config, withhold
from fedmed.deployment.site_config import Limits
from fedmed.deployment.site_facts import Facts
from fedmed.errors import UserError
from fedmed.federation.messages import IDENTITY, encode_config, pack

FACTS = Facts("A", 100)


def config(**sections: Any) -> Config:
    """A configuration with these sections."""
    return from_tree(sections)


def refusal(limits: Limits, cfg: Config, facts: Facts = FACTS) -> str:
    """What a site answers, without the part that is always the same."""
    with pytest.raises(UserError, match=r"^site 'A' refuses: ") as caught:
        check(limits, cfg, facts)
    return str(caught.value).removeprefix("site 'A' refuses: ")


# --- amounts ------------------------------------------------------------------------------------------------------


def test_epochs() -> None:
    check(Limits(max_epochs=3), config(training={"epochs": 3}), FACTS)
    assert refusal(Limits(max_epochs=3), config(training={"epochs": 4})).startswith("training.epochs=4, allowed are 3")


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"epochs": 2, "batch_size": 16}, 14),  # ceil(100 / 16) = 7 an epoch
        ({"epochs": 2, "batch_size": 16, "max_steps": 9}, 9),
        ({"epochs": 1, "batch_size": 200, "max_steps": 50}, 1),
    ],
)
def test_steps(training: dict[str, int], steps: int) -> None:
    check(Limits(max_steps=steps), config(training=training), FACTS)
    if steps > 1:
        assert f"a round of {steps} steps" in refusal(Limits(max_steps=steps - 1), config(training=training))


# --- methods and experiments --------------------------------------------------------------------------------------


def test_methods_name_clients_and_addons_that_are_switched_on() -> None:
    limits = Limits(methods=("supervised",))
    check(limits, config(client={"name": "supervised", "prox": {"enabled": False}}), FACTS)
    check(Limits(methods=("supervised", "prox")), config(client={"prox": {"enabled": True}}), FACTS)
    assert "'prox' is not one of the methods allowed here" in refusal(
        limits, config(client={"prox": {"enabled": True}})
    )
    assert "'fednoro' is not one" in refusal(limits, config(client={"name": "fednoro"}))
    assert "(none; limits.methods)" in refusal(Limits(methods=()), config())


def test_an_experiment_keeps_its_installed_client_part() -> None:
    limits = Limits(experiments=("fednoro",))
    check(
        limits, load_config("fednoro", ["training.epochs=9", "strategy.args=null", "model.args={widths: [4]}"]), FACTS
    )
    assert "experiment 'fedavg' is not one of those" in refusal(limits, load_config("fedavg"))
    check(limits, load_config("fednoro", ["client.args.min_count=2"]), FACTS)  # it withholds more
    for words in (
        ["client.args=null", "client.name=supervised"], ["client.args.tau=0.5"], ["client.prox.enabled=true"],
    ):  # fmt: skip
        changed = load_config("fednoro", words)
        assert "the client part differs from that of experiment 'fednoro'" in refusal(limits, changed)


# --- import paths -------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that could be imported, and must not be."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "evil_module:Thing"


@pytest.mark.parametrize(
    "sections",
    [
        {"client": {"name": "{}"}},
        {"model": {"name": "{}"}},
        {"strategy": {"name": "{}"}},
        {"client": {"addons": {"{}": {"enabled": False}}}},
        {"client": {"args": {"loss": "{}"}}},
        {"client": {"prox": {"enabled": True, "kind": ["{}"]}}},
        {"model": {"args": {"blocks": [{"norm": "{}"}]}}},
        {"data": {"augment": ["{}"]}},
    ],
)
@pytest.mark.parametrize("name", ["evil_module:Thing", "subprocess:Popen"])
def test_an_import_path_is_refused_before_it_is_imported(mine: str, sections: dict[str, Any], name: str) -> None:
    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key.format(name): fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        return node.format(name) if isinstance(node, str) else node

    cfg = read_config(yaml.safe_dump(fill(sections)))
    assert f"={name} would import code that is not part of FedMed" in refusal(Limits(min_count=5), cfg)
    assert "evil_module" not in sys.modules
    check(Limits(allow_imports=(name,)), cfg, FACTS)


def test_the_networks_of_monai_and_flowers_strategies_are_no_import_paths() -> None:
    check(Limits(), config(model={"name": "monai:DenseNet121"}, strategy={"name": "flwr:FedMedian"}), FACTS)
    for name in ("monai:networks.nets:UNet", "monai:os/system", "monai:"):
        assert "would import code" in refusal(Limits(), config(model={"name": name}))
    assert "would import code" in refusal(Limits(), config(client={"name": "monai:UNet"}))


@pytest.mark.parametrize(
    "args",
    [
        {"pretrained_url": "https://example.org/x.pth"}, {"pretrained": True}, {"weights": "DEFAULT"}, {"filename": "x.bin"},
        {"anything": "/etc/passwd"}, {"anything": ["..\\x"]},
    ],
)  # fmt: skip
def test_a_model_reads_and_fetches_nothing(args: dict[str, Any]) -> None:
    assert "reads and fetches nothing" in refusal(Limits(), config(model={"name": "monai:HoVerNet", "args": args}))
    check(Limits(), config(model={"name": "monai:HoVerNet", "args": {"pretrained": False, "mode": "fast"}}), FACTS)


# --- the configuration as it comes ----------------------------------------------------------------------------------


def test_a_configuration_is_read_as_it_was_sent() -> None:
    sent = load_config("fednoro", ["seed=3"])
    assert read_config(to_yaml(sent)) == sent


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:SECRET_OF_THE_SITE}",
        'name: "\\x24{oc.env:SECRET_OF_THE_SITE}"',
        "client: {args: {a: [{b: '${seed}'}]}}",
        "client: {args: {'${seed}': 1}}",
    ],
)
def test_an_interpolation_is_refused_and_not_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SITE", "hunter2")
    with pytest.raises(UserError, match="holds an interpolation") as caught:
        read_config(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "brings no configuration"), (" \n", "brings no configuration"), ("- a", "no keys at its top"), ("a: [", "not valid YAML"),
     ("seeed: 1", "unknown key 'seeed'")],
)  # fmt: skip
def test_what_is_no_configuration(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_config(text)


# --- least counts ---------------------------------------------------------------------------------------------------


def test_statistics_by_class_must_stand_for_enough_items() -> None:
    noro = {"client": {"name": "fednoro", "args": {"min_count": 4}}}
    check(Limits(min_count=4), config(**noro), FACTS)
    text = refusal(Limits(min_count=5), config(**noro))
    assert (
        "would send class_loss" in text
        and "may stand for 4 items, asked are 5" in text
        and "client.args.min_count=5" in text
    )
    assert "loss_in_*" in refusal(Limits(min_count=2), config(client={"name": "feda3i"}))
    check(Limits(min_count=1), config(client={"name": "feda3i"}), FACTS)
    check(Limits(min_count=50), config(client={"name": "scaffold"}), FACTS)  # whole-model arrays are not by class


def test_a_training_split_must_have_enough_items() -> None:
    check(Limits(min_count=5), config(), Facts("A", 5))
    assert "its training split has fewer than 5 items" in refusal(Limits(min_count=5), config(), Facts("A", 4))


def test_wrong_arguments_of_a_client_are_a_refusal_too() -> None:
    assert "unknown key 'client.args.tauu'" in refusal(Limits(min_count=2), config(client={"args": {"tauu": 1}}))


def test_least_counts_follow_the_arguments() -> None:
    found = least_counts(config(client={"name": "fedmlp", "args": {"min_count": 7}}))
    assert found["proto"][1] == 7 and found["num-examples"][1] == 1
    assert [name for name, (leaf, _) in found.items() if is_by_group(leaf)] == ["proto", "proto_count", "tau", "active"]


def test_many_reasons_are_counted() -> None:
    cfg = config(client={"name": "a:b", "args": {"x": "c:d"}}, model={"name": "e:f"}, training={"epochs": 9})
    text = refusal(Limits(max_epochs=1), cfg)
    assert text.count("; ") >= 3 and text.endswith("; and 1 more") and "\n" not in text


# --- replies --------------------------------------------------------------------------------------------------------


def test_scores_of_small_splits_are_withheld_with_their_counts() -> None:
    metrics = {
        "num-examples": 4, "n/test": 4, "test/global/acc": 0.5, "test/personal/acc": 0.6, "n/val": 5, "val/global/acc": 0.7,
        "n/test-with+T1": 3, "test-with+T1/global/dice": 0.1,
    }  # fmt: skip
    content = pack(metrics=metrics)
    assert withhold(content, "evaluate", 5) == ["test", "test-with+T1"]
    assert dict(content.metric_records["metrics"]) == {"num-examples": 0, "n/val": 5, "val/global/acc": 0.7}


def test_a_train_reply_keeps_its_number_of_training_items() -> None:
    content = pack(metrics={"num-examples": 40, "n/test": 4, "test/global/acc": 0.5, "train_loss": 1.0})
    assert withhold(content, "train", 5) == ["test"]
    assert dict(content.metric_records["metrics"]) == {"num-examples": 40, "train_loss": 1.0}


def test_without_a_limit_and_without_metrics_nothing_changes() -> None:
    content = pack(metrics={"num-examples": 1, "n/test": 1, "test/global/acc": 1.0})
    before = dict(content.metric_records["metrics"])
    assert withhold(content, "evaluate", 1) == [] and dict(content.metric_records["metrics"]) == before
    assert withhold(RecordDict({"other": MetricRecord({"n/test": 1})}), "evaluate", 5) == []


def test_an_identity_hides_small_counts() -> None:
    content = RecordDict({IDENTITY: encode_config({"site": "A", "num_train": 40, "num_val": 2, "num_test": 0})})
    assert withhold(content, "query", 5) == ["val"]
    assert dict(content.config_records[IDENTITY]) == {"site": "A", "num_train": 40, "num_val": 0, "num_test": 0}
