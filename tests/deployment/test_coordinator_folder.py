"""The coordinator's folder: made whole, private and movable; what is wrong with one is said with its remedy."""

from __future__ import annotations

import json
import shutil
import ssl
import stat
import threading
import tomllib
from pathlib import Path

import pytest

from fedmed.deployment import keys
from fedmed.deployment.coordinator_folder import ApprovedSite, CoordinatorFolder
from fedmed.engines.flower_internals import CONNECTION
from fedmed.errors import UserError

SITE = ApprovedSite(2**64 - 5, "SHA256:abc", "2026-01-02T03:04:05+00:00", "ecdsa-sha2-nistp384 AAAA")


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    """A fresh coordinator's folder."""
    return CoordinatorFolder.create(tmp_path / "fl", ["fl.example.org,10.1.2.3", "fd00::1"], 8123)


def test_what_is_made_is_private_and_can_be_opened(folder: CoordinatorFolder) -> None:
    modes = {p.relative_to(folder.path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.path.rglob("*")}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert modes.pop("ca.crt") == 0o644
    assert all(mode == (0o700 if (folder.path / name).is_dir() else 0o600) for name, mode in modes.items())
    again = CoordinatorFolder.open(folder.path)
    assert (again.hosts, again.port) == (("fl.example.org", "10.1.2.3", "fd00::1"), 8123)
    assert again.address == "127.0.0.1:8123"
    assert again.public_addresses == ("fl.example.org:8123", "10.1.2.3:8123", "[fd00::1]:8123")
    assert again.sites() == {} and again.runs.is_dir()
    assert keys.hosts_of(again.certificate())[:3] == again.hosts
    assert len(again.secret_file.read_bytes()) == 64
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(again.server_certificate, again.server_key)


def test_two_coordinators_share_nothing(folder: CoordinatorFolder, tmp_path: Path) -> None:
    other = CoordinatorFolder.create(tmp_path / "other", ["fl.example.org"])
    for name in ("secret_file", "ca_file", "server_key", "authority_key"):
        assert getattr(folder, name).read_bytes() != getattr(other, name).read_bytes()
    assert not keys.is_signed_by(folder.certificate(), other.authority())


def test_an_existing_folder_is_taken_only_if_it_is_empty(folder: CoordinatorFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a coordinator's folder already"):
        CoordinatorFolder.create(folder.path, ["a"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            CoordinatorFolder.create(tmp_path / name, ["a"])
    (tmp_path / "empty").mkdir(mode=0o755)
    made = CoordinatorFolder.create(tmp_path / "empty", ["a"])
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    with pytest.raises(UserError, match="cannot make the folder"):
        CoordinatorFolder.create(tmp_path / "file" / "below", ["a"])


@pytest.mark.parametrize("hosts", [[], [" , "], ["a b"]])
def test_without_a_proper_host_nothing_is_made(tmp_path: Path, hosts: list[str]) -> None:
    with pytest.raises(UserError, match="--host"):
        CoordinatorFolder.create(tmp_path / "fl", hosts)
    with pytest.raises(UserError, match="--port: expected a number from 1 to 65535, got 0"):
        CoordinatorFolder.create(tmp_path / "fl", ["a"], 0)
    assert not (tmp_path / "fl").exists()


def test_a_folder_that_is_none_or_is_broken(folder: CoordinatorFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no coordinator's folder .*fedmed coordinator init"):
        CoordinatorFolder.open(tmp_path)
    with pytest.raises(UserError, match="is no coordinator's folder"):
        CoordinatorFolder.open(folder.ca_file)
    settings = folder.path / "coordinator.json"
    for content in ("", "[]", '{"hosts": ["a"]}'):
        settings.write_text(content)
        with pytest.raises(UserError, match=r"coordinator.json is damaged .*restore it"):
            CoordinatorFolder.open(folder.path)
    settings.write_text('{"hosts": ["a"], "port": "8000"}')
    with pytest.raises(UserError, match="--port: expected a number"):
        CoordinatorFolder.open(folder.path)
    settings.write_text('{"hosts": ["a"], "port": 8000}')
    folder.secret_file.unlink()
    with pytest.raises(UserError, match=r"superexec is missing: restore"):
        CoordinatorFolder.open(folder.path)


@pytest.mark.parametrize("name", ["", "tls", "tls/server.key", "ca/ca.key", "secret/superexec", "sites.json", "state"])
def test_loose_permissions_are_refused_and_the_remedy_works(folder: CoordinatorFolder, name: str) -> None:
    path = folder.path / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o040)
    with pytest.raises(UserError, match=f"chmod -R go= {folder.path}") as caught:
        CoordinatorFolder.open(folder.path)
    assert str(path) in str(caught.value)
    for each in [folder.path, *folder.path.rglob("*")]:
        each.chmod(stat.S_IMODE(each.stat().st_mode) & ~0o077)
    CoordinatorFolder.open(folder.path)


def test_renewing_keeps_the_authority_and_what_sites_were_given(folder: CoordinatorFolder) -> None:
    before, ca = folder.server_certificate.read_bytes(), folder.ca_file.read_bytes()
    renewed = folder.renew()
    assert renewed.hosts == folder.hosts and renewed.port == 8123
    assert folder.server_certificate.read_bytes() != before and folder.ca_file.read_bytes() == ca
    other = CoordinatorFolder.open(folder.path).renew(["new.example.org"], 9000, days=10)
    opened = CoordinatorFolder.open(folder.path)
    assert (opened.hosts, opened.port) == (other.hosts, other.port) == (("new.example.org",), 9000)
    assert 9.9 < keys.days_left(opened.certificate()) <= 10
    assert stat.S_IMODE(folder.server_key.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="expected a host name"):
        opened.renew(["a b"])


def test_an_expired_certificate_is_refused_until_it_is_renewed(folder: CoordinatorFolder) -> None:
    folder.renew(days=-1)
    with pytest.raises(UserError, match=rf"ended on \d{{4}}-.*fedmed coordinator renew {folder.path}"):
        CoordinatorFolder.open(folder.path)
    CoordinatorFolder.open(folder.path, expired_ok=True).renew()
    CoordinatorFolder.open(folder.path)


def test_the_authority_key_may_be_kept_elsewhere(folder: CoordinatorFolder) -> None:
    folder.authority_key.unlink()
    opened = CoordinatorFolder.open(folder.path)
    with pytest.raises(UserError, match=r"ca\.key: No such file.*put it back"):
        opened.renew()


def test_a_certificate_of_another_authority_is_noticed(folder: CoordinatorFolder, tmp_path: Path) -> None:
    other = CoordinatorFolder.create(tmp_path / "other", ["fl.example.org"])
    shutil.copy(other.ca_file, folder.ca_file)
    with pytest.raises(UserError, match="was not signed by"):
        CoordinatorFolder.open(folder.path)
    shutil.copy(other.server_key, folder.server_key)
    with pytest.raises(UserError, match="does not belong to"):
        CoordinatorFolder.open(folder.path)


def test_flowers_settings_follow_a_folder_that_moves(folder: CoordinatorFolder, tmp_path: Path) -> None:
    def connection(of: CoordinatorFolder) -> dict[str, object]:
        found = tomllib.loads((of.flower_home / "config.toml").read_text())["superlink"]
        assert found["default"] == CONNECTION
        return dict(found[CONNECTION])

    assert connection(folder) == {"address": "127.0.0.1:8123", "root-certificates": str(folder.ca_file)}
    moved = CoordinatorFolder.open(shutil.move(folder.path, tmp_path / 'a "quoted" place'))
    assert connection(moved) == {"address": "127.0.0.1:8123", "root-certificates": str(moved.ca_file)}
    assert connection(moved.renew(port=9000))["address"] == "127.0.0.1:9000"


def test_the_environment_of_flowers_programs(folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_INTERNAL_X", "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # would let any caller pass for this machine
    monkeypatch.setenv("NO_PROXY", "intranet")
    env = folder.environment()
    assert env["FLWR_HOME"] == str(folder.flower_home) and env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert "FLWR_INTERNAL_X" not in env and "FORWARDED_ALLOW_IPS" not in env
    assert env["NO_PROXY"] == "intranet,127.0.0.1,localhost" and env["no_proxy"].endswith("127.0.0.1,localhost")
    assert folder.secret_file.read_text() not in " ".join(env.values())


def test_sites_are_kept_with_all_digits_and_in_order(folder: CoordinatorFolder) -> None:
    with folder.changed_sites() as sites:
        sites["z"] = SITE
        sites["Ärzte (Nord)"] = SITE
        sites["a"] = SITE
    assert list(folder.sites()) == ["a", "z", "Ärzte (Nord)"]
    assert folder.sites()["a"] == SITE  # node ids need 64 bits
    assert stat.S_IMODE(folder.sites_file.stat().st_mode) == 0o600
    with pytest.raises(RuntimeError), folder.changed_sites() as sites:
        sites.clear()
        raise RuntimeError("Flower said no")
    assert len(folder.sites()) == 3


def test_sites_are_changed_by_one_at_a_time(folder: CoordinatorFolder) -> None:
    def add(name: str) -> None:
        with CoordinatorFolder.open(folder.path).changed_sites() as sites:
            sites[name] = SITE

    threads = [threading.Thread(target=add, args=(f"site {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(folder.sites()) == 8


def test_a_damaged_list_of_sites_is_said_and_a_missing_one_is_empty(folder: CoordinatorFolder) -> None:
    for content in ("{", "[]", json.dumps({"a": {"node": 1}}), json.dumps({"a": 1})):
        folder.sites_file.write_text(content)
        with pytest.raises(UserError, match=r"cannot read .*sites\.json .*restore"):
            folder.sites()
    folder.sites_file.unlink()
    assert folder.sites() == {}
