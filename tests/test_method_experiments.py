"""Each method's experiment file names things that exist, belong together and accept their arguments."""

from __future__ import annotations

import pytest

from fedmed.config import experiment_dirs, load_config, params_from
from fedmed.federation.client import declared_leaves
from fedmed.registry import resolve

METHODS = sorted(path.stem for path in experiment_dirs()[-1].glob("[a-z]*.yaml") if not path.stem.startswith("demo_"))


@pytest.mark.parametrize("method", METHODS)
def test_experiment_is_complete(method: str) -> None:
    config = load_config(method)
    rule, client = resolve("strategy", config.strategy.name), resolve("client", config.client.name)
    params_from(rule.Params, config.strategy.args, "strategy.args")
    params_from(client.Params, config.client.args, "client.args")
    addons = {name: resolve("add-on", name) for name in config.client.addons}
    for name, addon in addons.items():
        params_from(addon.Params, config.client.addons[name], f"client.{name}")
    declared = {leaf.name for leaf in declared_leaves(client, addons)}
    assert set(rule.requires) <= declared
    phantom = config.data.path.removeprefix("phantom:")
    task = {"multimodal": "segmentation"}.get(phantom, phantom)  # the one phantom that is not named after its task
    assert task in rule.tasks and task in client.tasks
    assert config.description
