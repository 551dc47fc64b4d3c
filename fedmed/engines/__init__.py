"""Engines: where a run runs. `run` is what the command line and Python users call."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from fedmed.config import Config
    from fedmed.federation.history import Callback


def run(
    config: Config,
    *,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    client_app: ClientApp | None = None,
    coordinator: str | Path | None = None,
    **grid_options: Any,
) -> dict[str, Any]:
    """Run on the engine of the configuration and give the summary; `config.out` names the run folder.

    `coordinator`: folder of the coordinator whose sites take part (deployment engine). `client_app`: another Flower ClientApp in place of
    ours (local engine, with `federation.plain_clients=true`). `grid_options` go to `LocalGrid`. Raises `UserError` and `QuorumLost`.
    """
    import torch

    from fedmed.config import to_yaml
    from fedmed.engines.prepare import count_sites, site_file, with_absolute_paths

    if coordinator is not None or config.engine.name == "deployment":
        from fedmed.engines.deployment import check_coordinator
        from fedmed.engines.deployment import run as run_deployment

        folder = check_coordinator(config, coordinator)
        return run_deployment(config, folder, resume=resume, callbacks=callbacks)
    config = with_absolute_paths(config)
    num_sites = count_sites(site_file(config))
    if config.engine.name == "ray":
        from fedmed.engines.follow import run_ray

        return run_ray(config, num_sites, resume=resume, callbacks=callbacks)
    from fedmed.client_app import app as own_app
    from fedmed.engines.flower_internals import quiet_log
    from fedmed.engines.local import LocalGrid
    from fedmed.server_app import run_server

    quiet_log()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.engine.threads)
        grid = LocalGrid(client_app or own_app, num_sites, {"config": to_yaml(config)}, **grid_options)
        return run_server(grid, config, callbacks=callbacks, resume=resume)
    finally:
        torch.set_num_threads(threads)
