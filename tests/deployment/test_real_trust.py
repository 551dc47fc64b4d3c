"""Who is let in and what is run: keys, certificates, bundles and limits, with real processes at both ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from loopback import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

SETTINGS = ("data.path=''", "training.epochs=1", "federation.rounds=1", "federation.start_deadline_s=25")

# `fedmed`, but the bundle it hands in carries code that leaves a trace wherever it is imported.
TAMPERED = """
import sys
from fedmed.engines import bundle
bundle._MODULE = "open({trace!r}, 'a').write(__name__)\\n" + bundle._MODULE
from fedmed.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_tampered_bundle_is_refused_and_never_imported(federation: Loopback, tmp_path: Path) -> None:
    sites = federation.start_all()
    trace = tmp_path / "trace"
    words = federation.run_words(tmp_path / "run", "fedavg", *SETTINGS, "federation.min_sites=3")
    done = subprocess.run(
        [sys.executable, "-c", TAMPERED.format(trace=str(trace)), *words],
        env=federation.env, cwd=federation.root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode in (2, 3), text
    assert "bundle" in text and "alpha" in text, text
    assert all("refuses the bundle" in process.text for process in sites.values())
    assert not trace.exists(), trace.read_text()


def test_what_goes_beyond_a_sites_limits_is_refused_with_a_reason_that_arrives(
    federation: Loopback, tmp_path: Path
) -> None:
    federation.init()
    federation.start_coordinator()
    for name in federation.files:
        federation.make_site(name, limits="{max_epochs: 2, methods: [supervised]}")
        federation.start_site(name)
    asked = ("data.path=''", "federation.rounds=1", "federation.start_deadline_s=25", "federation.min_sites=3")
    run = federation.run(tmp_path / "epochs", "fedavg", *asked, "training.epochs=5", code=3)
    assert "training.epochs=5" in run.text and "max_epochs" in run.text
    run = federation.run(tmp_path / "method", "ditto", *asked, "training.epochs=1", code=3)
    assert "ditto" in run.text and "limits.methods" in run.text
    federation.run(tmp_path / "fine", "fedavg", *asked, "training.epochs=2")


def test_an_unknown_key_a_wrong_authority_and_plain_text_are_refused_at_both_ends(federation: Loopback) -> None:
    federation.init()
    coordinator = federation.start_coordinator()
    log = federation.coordinator_dir / "logs" / "superlink.log"

    federation.make_site("alpha", approve=False)
    unknown = federation.start_site("alpha", wait=False)
    unknown.until("coordinator approve")
    assert unknown.stop() == 0

    federation.make_site("beta")
    folder = federation.root / "sites" / "beta"
    other = federation.root / "other"
    federation.do("coordinator", "init", str(other), "--host", "localhost", "--port", str(federation.port))
    (folder / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    wrong = federation.start_site("beta", wait=False)
    wrong.until("ca.crt|authority|certificate")
    assert wrong.stop() == 0

    said = coordinator.text + log.read_text(errors="replace")
    assert "approve" in said and "key" in said, said[-2000:]
    assert "ca.crt" in said or "certificate" in said, said[-2000:]


def test_a_key_that_others_may_read_is_refused(federation: Loopback) -> None:
    federation.init()
    federation.start_coordinator()
    settings = federation.make_site("alpha")
    (settings.parent / "site.key").chmod(0o644)
    text = federation.do("site", "start", str(settings), code=2)
    assert "chmod 600" in text and "PRIVATE" not in text
    (federation.coordinator_dir / "ca" / "ca.key").chmod(0o644)
    text = federation.do("coordinator", "status", str(federation.coordinator_dir), code=2)
    assert "ca.key may be read or changed by others" in text and "chmod -R go=" in text
