"""site.yaml: what is read, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedmed.deployment.site_config import Limits, SiteConfig, read_site_config, split_address
from fedmed.deployment.site_keygen import keygen
from fedmed.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = "name: a\ndata: d.h5\ncoordinator: fl.example.org:8000\nca: ca.crt\nkey: k/site.key\nstate: s\n"


def write(folder: Path, text: str) -> Path:
    """Write site.yaml."""
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_limits_are_open_by_default(tmp_path: Path) -> None:
    config = read_site_config(write(tmp_path, SMALL))
    assert (config.data, config.key) == (tmp_path / "d.h5", tmp_path / "k" / "site.key")
    assert config.log_file == tmp_path / "s" / "logs" / "site.log"
    assert (config.host, config.port, config.device, config.reconnect_hours) == ("fl.example.org", 8000, "auto", 24.0)
    assert config.limits == Limits() and config.limits.min_count == 1 and config.limits.methods is None


def test_everything_can_be_set(tmp_path: Path) -> None:
    more = (
        f"device: cuda:1\nlog: /var/log/x.log\nreconnect_hours: 0.5\nbundles: [{'ab' * 32}]\nlimits:\n  max_epochs: 3\n  max_steps: 9\n"
        "  methods: [supervised, prox]\n  experiments: [fednoro]\n  min_count: 5\n  allow_imports: ['mine.net:Net']\n"
    )
    config = read_site_config(write(tmp_path, SMALL + more))
    assert config.log_file == Path("/var/log/x.log") and config.bundles == ("ab" * 32,)
    assert config.limits == Limits(3, 9, ("supervised", "prox"), ("fednoro",), 5, ("mine.net:Net",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALL + "limit: {}\n", "unknown key 'limit'; did you mean 'limits'"),
        (SMALL + "limits: {max_epoch: 3}\n", "unknown key 'limits.max_epoch'; did you mean 'max_epochs'"),
        (SMALL + "limits: {max_epochs: 0}\n", "max_epochs: expected a whole number >= 1"),
        (SMALL + "limits: {max_epochs: many}\n", "limits.max_epochs: expected int"),
        (SMALL + "limits: {min_count: 2}\nlimits: {min_count: 1}\n", "duplicate key limits"),
        (SMALL + "limits: {methods: fednoro}\n", "expected a list, for example \\[fednoro\\]"),
        (SMALL + "limits: {methods: [fednoroo]}\n", "no client or add-on is called 'fednoroo'; did you mean 'fednoro'"),
        (SMALL + "limits: {experiments: [fednoroo]}\n", "no experiment is called 'fednoroo'; did you mean 'fednoro'"),
        (SMALL + "limits: {experiments: ['../x']}\n", "no experiment is called '../x'"),
        (SMALL + "limits: {allow_imports: [os]}\n", "allow_imports: expected 'module:attribute', got 'os'"),
        (SMALL + "device: gpu\n", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (SMALL + "reconnect_hours: 0\n", "reconnect_hours: expected a number > 0"),
        (SMALL + "bundles: [abc]\n", "bundles: expected SHA-256 sums"),
        (SMALL.replace("name: a", "name: ' a'"), "name: expected one line"),
        (SMALL.replace("org:8000", "org"), "coordinator: expected host:port"),
        (SMALL.replace("fl.", "https://fl."), "coordinator: expected host:port"),
        (SMALL.replace("ca: ca.crt\n", ""), "ca missing; `fedmed site keygen` writes a file to fill in"),
        ("name: [", "is not valid YAML"),
        ("- a\n", "expected keys and values"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_site_config(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; `fedmed site keygen DIR`"):
        read_site_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a:1", ("a", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:8000", ("::1", 8000))],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts


@pytest.mark.parametrize("text", ["", "a", ":1", "a:0", "a:65536", "a:x", "::1:8000", "[a]:1", "a b:1", "a/b:1"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        split_address(text)


@pytest.mark.parametrize("name", ["siteA", "1e3", "ham a: 'x' \"y\" #z", "Klinik für Augen"])
def test_the_template_of_keygen_is_a_valid_site_yaml(tmp_path: Path, name: str) -> None:
    folder, _ = keygen(tmp_path / "site", name)
    config = read_site_config(folder / "site.yaml")
    assert config.name == name and config.key == folder / "site.key" and config.limits == Limits()


def test_every_key_is_in_the_template(tmp_path: Path) -> None:
    text = (keygen(tmp_path / "site")[0] / "site.yaml").read_text()
    for cls in (SiteConfig, Limits):
        for field in dataclasses.fields(cls):
            assert f"{field.name}:" in text
    uncommented = re.sub(r"(?m)^(\s*)# (\w+:)", r"\1\2", text)
    config = read_site_config(write(tmp_path, uncommented))
    assert config.limits.max_steps == 1000 and config.limits.experiments == ("fednoro",)


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedmed.deployment.site_config import read_site_config\n"
        f"read_site_config({str(write(tmp_path, SMALL))!r})\nprint(sorted({{'torch', 'flwr', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
