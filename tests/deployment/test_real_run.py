"""Three sites behind TLS and keys, as processes of their own: the same model as in a simulation, and nothing of a site at the coordinator."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import pytest
from loopback import Loopback, loopback

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

SHORT = (
    "training.epochs=1",
    "federation.rounds=3",
    "strategy.args.warmup_rounds=1",
    "evaluation.mode=before",
    "seed=5",
)


def test_the_model_is_that_of_a_simulation_and_the_sites_keep_what_is_theirs(
    tmp_path: Path, real_sites: dict[str, Path]
) -> None:
    with loopback(tmp_path / "federation", real_sites) as federation:
        sites = federation.start_all()
        out = tmp_path / "deployed"
        federation.run(out, "fednoro", *SHORT, "federation.min_sites=3")
        federation.simulate(tmp_path / "simulated", "fednoro", *SHORT, "federation.min_sites=3")
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "simulated" / "model.safetensors").read_bytes()
        assert all(process.popen.poll() is None for process in sites.values())

        check_coordinator_holds_aggregates_only(out, real_sites)
        for name in sites:
            check_site_folder(federation, name)
        check_no_secrets_are_written(federation, out)

        shown = federation.do("coordinator", "status", str(federation.coordinator_dir))
        assert all(name in shown for name in sites) and "online" in shown


def check_coordinator_holds_aggregates_only(out: Path, files: dict[str, Path]) -> None:
    """No file with single cases, and no name of an item anywhere in the run folder."""
    import h5py

    items = []
    for file in files.values():
        with h5py.File(file) as opened:
            items += [value.decode() for value in opened["item_id"][:20]]
    assert not (out / "sites").exists() and not list(out.rglob("cases.csv"))
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml", ".md", ".csv", ".log"):
            text = path.read_text(errors="replace")
            assert not any(item in text for item in items), f"{path} names items of a site"


def check_site_folder(federation: Loopback, name: str) -> None:
    """Scores by case lie in the state folder, which only its owner may look into."""
    state = federation.root / "sites" / name / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    cases = list(state.rglob("cases.csv"))
    assert len(cases) == 1
    with cases[0].open() as file:
        assert len(list(csv.DictReader(file))) > 0
    loose = [p for p in state.rglob("*") if p.is_dir() and stat.S_IMODE(p.stat().st_mode) & 0o077]
    assert not loose, loose


def check_no_secrets_are_written(federation: Loopback, out: Path) -> None:
    """Neither private keys nor shared secrets are in a log, a run folder or what was printed."""
    secrets = [p.read_bytes().strip() for p in federation.root.rglob("secret*") if p.is_file()]
    secrets += [p.read_bytes().strip() for p in federation.root.rglob("*.key")]
    assert len(secrets) >= 5  # authority, server, coordinator's secret, three sites
    fragments = [s.splitlines()[1] if b"PRIVATE KEY" in s else s for s in secrets]
    texts = [p for p in federation.root.rglob("*.log*") if p.is_file()] + [p for p in out.rglob("*") if p.is_file()]
    for path in texts:
        content = path.read_bytes()
        assert not any(fragment and fragment in content for fragment in fragments), f"{path} holds a secret"
