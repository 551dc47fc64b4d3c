"""Dockerfile and docker-compose.yml, without Docker: every command line in them against the parsers of `fedmed`, every path against the
mounts, and what keeps a container small: users, capabilities, ports, TLS.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

import fedmed
from fedmed.deployment import supervise
from fedmed.deployment.site_config import read_site_config
from fedmed.deployment.site_keygen import keygen
from fedmed.engines.flower_internals import QUIET_SWITCHES

ROOT = Path(__file__).resolve().parents[2]
SITES = ("site-a", "site-b", "site-c")
LONG_RUNNING = ("coordinator", *SITES)
ONCE = ("coordinator-setup", "run", *(f"{site}-setup" for site in SITES))
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


command_lines = _load(Path(__file__).with_name("command_lines.py"))
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def services(**settings: str) -> dict[str, dict[str, Any]]:
    """The services of docker-compose.yml by name, with variables from `settings` or their defaults, as Compose fills them in."""
    text = _VARIABLE.sub(lambda match: settings.get(match[1], match[2] or ""), COMPOSE)
    return dict(yaml.safe_load(text)["services"])


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile as (keyword, rest), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last(keyword: str) -> str:
    """What the last instruction of a kind says."""
    return [rest for word, rest in instructions() if word == keyword][-1]


def words_of(service: dict[str, Any]) -> list[str]:
    """The command line of a service: its own or the image's entrypoint, then its own or the image's command."""
    entrypoint = service.get("entrypoint", json.loads(last("ENTRYPOINT")))
    default = [] if "entrypoint" in service else json.loads(last("CMD"))  # a new entrypoint drops the image's command
    return [*entrypoint, *service.get("command", default)]


def mounts(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The bind mounts of a service by the place where they are seen."""
    return {mount["target"]: mount for mount in service["volumes"]}


def is_writable(service: dict[str, Any], path: str) -> bool:
    """Whether a service may write at a path: the nearest mount above it decides."""
    above = [target for target in mounts(service) if path == target or path.startswith(f"{target}/")]
    return bool(above) and not mounts(service)[max(above, key=len)].get("read_only", False)


# ---------------------------------------------------------------------- command lines


def test_these_are_the_services() -> None:
    assert set(services()) == {*LONG_RUNNING, *ONCE}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("coordinator", "coordinator start"),
        ("coordinator-setup", "coordinator init"),
        *((site, "site start") for site in SITES),
        *((f"{site}-setup", "site keygen") for site in SITES),
    ],
)
def test_the_command_of_a_service_parses(name: str, command: str) -> None:
    assert command_lines.parse(words_of(services()[name])).command == command


def test_the_run_service_takes_an_experiment_and_its_settings() -> None:
    run = services()["run"]
    assert run["command"] == ["--help"]  # nobody starts a run by accident
    found = command_lines.parse([*run["entrypoint"], "fednoro", "federation.rounds=2", "--out", "/coordinator/runs/x"])
    assert found.command == "run"
    assert found.values["engine"] == "deployment" and found.values["coordinator"] == "/coordinator"
    assert found.values["experiment"] == "fednoro" and list(found.values["overrides"]) == ["federation.rounds=2"]


def test_the_command_of_the_image_parses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as end:
        command_lines.parse([*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))])
    assert end.value.exit_code == 0 and "coordinator" in capsys.readouterr().out


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_health_checks_parse(name: str) -> None:
    how, *words = services()[name]["healthcheck"]["test"]
    assert how == "CMD"
    found = command_lines.parse(words)
    assert found.command == ("coordinator status" if name == "coordinator" else "site status")
    place = "folder" if name == "coordinator" else "file"
    running = command_lines.parse(words_of(services()[name]))
    assert found.values[place] == running.values[place]


def test_commands_given_in_comments_parse() -> None:
    lines = re.findall(r"# docker compose run --rm (\S+)((?: \S+)*)", COMPOSE)
    assert len(lines) == 5
    for name, rest in lines:
        service = services()[name]
        given = rest.replace("EXPERIMENT", "fednoro").replace("[KEY=VALUE]...", "").split()
        command_lines.parse([*service["entrypoint"], *(given or service["command"])])


@pytest.mark.parametrize(
    "line",
    [
        "fedmed coordinator start /coordinator --insecure",
        "fedmed coordinator begin /coordinator",
        "fedmed site start",
        "flower-superlink --insecure",
    ],
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        command_lines.parse(line.split())


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [*LONG_RUNNING, *ONCE])
def test_paths_in_commands_are_mounted(name: str) -> None:
    service = services()[name]
    words = [*words_of(service), *service.get("healthcheck", {}).get("test", []), service.get("working_dir", "/tmp")]
    paths = [word for word in words if word.startswith("/") and word != "/tmp"]
    assert paths
    for path in paths:
        assert any(path == target or path.startswith(f"{target}/") for target in mounts(service)), path


@pytest.mark.parametrize("name", [*LONG_RUNNING, *ONCE])
def test_a_folder_that_is_missing_is_not_made_as_root(name: str) -> None:
    for mount in services()[name]["volumes"]:
        assert mount["type"] == "bind" and mount["bind"]["create_host_path"] is False


@pytest.mark.parametrize("site", SITES)
def test_a_site_writes_into_its_state_folder_only(site: str, tmp_path: Path) -> None:
    service, setup = services()[site], services()[f"{site}-setup"]
    folder, _ = keygen(tmp_path / "site", site)  # what the setup service makes, as it stands
    config = read_site_config(folder / "site.yaml")
    seen = {
        name: f"/site/{getattr(config, name).relative_to(folder).as_posix()}" for name in ("data", "ca", "key", "state")
    }
    assert words_of(service)[-1] == "/site/site.yaml"
    assert is_writable(service, seen["state"])
    assert is_writable(service, f"/site/{config.log_file.relative_to(folder).as_posix()}")
    assert not any(is_writable(service, path) for path in (seen["data"], seen["ca"], seen["key"], "/site/site.yaml"))
    assert str(Path(seen["data"]).parent) in mounts(service)  # the data have a mount of their own
    assert is_writable(setup, "/site/site.key") and set(mounts(setup)) == {"/site"}
    name = command_lines.parse(words_of(setup)).values["name"]
    assert name == site


def test_a_site_sees_nothing_of_another() -> None:
    sources = {site: {mount["source"] for mount in services()[site]["volumes"]} for site in SITES}
    for site in SITES:
        assert all(f"/{site}" in source for source in sources[site])
    letters = [json.dumps(services()[site]).replace(site, "site-x") for site in SITES]
    assert len(set(letters)) == 1  # alike but for the letter


# ---------------------------------------------------------------------- rights


def test_nobody_is_root() -> None:
    ids = re.fullmatch(r"(\d+):(\d+)", last("USER"))
    assert ids is not None and int(ids[1]) > 0 and int(ids[2]) > 0
    users = {service["user"] for service in services().values()}
    assert users == {last("USER")}
    assert f"--uid {ids[1]}" in DOCKERFILE and f"--gid {ids[2]}" in DOCKERFILE
    assert {service["user"] for service in services(FEDMED_USER="1234:5678").values()} == {"1234:5678"}


@pytest.mark.parametrize("name", [*LONG_RUNNING, *ONCE])
def test_a_container_may_do_little(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "volumes_from", "env_file"} & set(service)
    assert all("docker.sock" not in mount["source"] for mount in service["volumes"])
    assert any(entry.startswith("/tmp:") for entry in service["tmpfs"])
    assert service["pids_limit"] > 0 and service["init"] is True
    assert service["image"] == f"fedmed:{fedmed.__version__}" and service["pull_policy"] == "never"


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_what_runs_for_long_comes_back_and_ends_in_peace(name: str) -> None:
    service = services()[name]
    assert service["restart"] == "unless-stopped" and "mem_limit" in service
    assert int(service["stop_grace_period"].removesuffix("s")) > 2 * supervise.GRACE_S


@pytest.mark.parametrize("name", ONCE)
def test_what_runs_once_does_not_come_back(name: str) -> None:
    assert "restart" not in services()[name] and "healthcheck" not in services()[name]


# ---------------------------------------------------------------------- network


def test_tls_is_never_off() -> None:
    for text in (COMPOSE, DOCKERFILE):
        assert "insecure" not in text.lower()
    for name in ("coordinator", *SITES):  # our commands start Flower with TLS and keys, and have no switch for it
        with pytest.raises(click.NoSuchOption):
            command_lines.parse([*words_of(services()[name]), "--insecure"])


def test_one_port_is_published() -> None:
    found = services(FEDMED_PORT="8443")
    assert [name for name, service in found.items() if "ports" in service] == ["coordinator"]
    assert found["coordinator"]["ports"] == ["8443:8443"]
    assert command_lines.parse(words_of(found["coordinator-setup"])).values["port"] == 8443
    assert all(service.get("network_mode") != "host" for service in found.values())


def test_the_run_command_is_on_the_coordinators_own_machine() -> None:
    assert services()["run"]["network_mode"] == "service:coordinator"


def test_setting_up_needs_no_network() -> None:
    assert all(service["network_mode"] == "none" for name, service in services().items() if name.endswith("-setup"))


def test_the_certificate_is_for_the_names_in_use() -> None:
    def hosts(**settings: str) -> list[str]:
        given = command_lines.parse(words_of(services(**settings)["coordinator-setup"])).values["host"]
        return [host for words in given for host in words.split(",")]

    assert set(hosts()) == {"coordinator"}  # the service, as the sites of a rehearsal call it
    several = hosts(COORDINATOR_HOSTS="fl.example.org,203.0.113.7")
    assert several == ["fl.example.org", "203.0.113.7", "coordinator"]


# ---------------------------------------------------------------------- profiles


def started(profile: str) -> set[str]:
    """What `docker compose --profile PROFILE up` starts."""
    return {name for name, service in services().items() if profile in service["profiles"]}


def test_every_machine_starts_its_own_part() -> None:
    assert started("coordinator") == {"coordinator"}
    for site in SITES:
        assert started(site) == {site}
    assert started("rehearsal") == set(LONG_RUNNING)
    assert all(service["profiles"] for service in services().values())  # without one it would start everywhere


def test_a_service_is_started_with_what_it_depends_on() -> None:
    for service in services().values():
        needed = {service.get("network_mode", "").partition("service:")[2], *service.get("depends_on", ())} - {""}
        for profile in service["profiles"]:
            assert needed <= started(profile)


def test_variables_have_a_default_and_are_explained() -> None:
    code = re.sub(r"^\s*#.*$", "", COMPOSE, flags=re.MULTILINE)
    used = {match[1] for match in _VARIABLE.finditer(code)}
    assert all(match[2] is not None for match in _VARIABLE.finditer(code))
    explained = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", COMPOSE.partition("x-fedmed")[0])) - {"COMPOSE_PROFILES"}
    assert {re.sub("^SITE_[BC]_", "SITE_A_", name) for name in used} == explained


# ---------------------------------------------------------------------- image


def test_no_registry_is_named() -> None:
    for text in (COMPOSE, DOCKERFILE, (ROOT / ".dockerignore").read_text(encoding="utf-8")):
        assert "://" not in text
    assert {rest.split()[0] for word, rest in instructions() if word == "FROM"} == {"python:3.11-slim"}
    assert f"docker build -t fedmed:{fedmed.__version__} ." in DOCKERFILE
    assert "ARG PIP_OPTIONS" in DOCKERFILE and set(services()["run"]["build"]["args"]) == {"PIP_OPTIONS"}


def test_the_image_is_quiet_and_has_no_check_of_its_own() -> None:
    values = dict(word.split("=", 1) for word in shlex.split(last("ENV")))
    assert {name: values.get(name) for name in QUIET_SWITCHES} == QUIET_SWITCHES
    assert all(
        values[name].startswith("/tmp") for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")
    )
    assert not [rest for word, rest in instructions() if word in ("HEALTHCHECK", "EXPOSE", "VOLUME")]


def test_nothing_is_installed_after_the_build() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "pip " not in final and "apt" not in final
    installs = re.findall(r"pip install [^&\n]*", DOCKERFILE)
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line or "--no-index" in line for line in installs)


def copied() -> list[str]:
    """Files and folders of the project that the image is made of."""
    return [
        word for key, rest in instructions() if key == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]


def test_everything_copied_gets_past_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"  # nothing that happens to lie about: data, keys, runs
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())
    assert {"**/*.h5", "**/__pycache__"} <= set(rules)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel that the image installs, made of the files that are copied into it."""
    place = tmp_path_factory.mktemp("context")
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.h5"))
        else:
            shutil.copy(source, place / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place / "wheels")]
    subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next((place / "wheels").glob("*.whl"))) as file:
        yield file


def test_the_wheel_of_the_image_is_complete(wheel: zipfile.ZipFile) -> None:
    names, packages = set(wheel.namelist()), ("fedmed", "strategies", "clients", "data_prep")
    sources = {path.relative_to(ROOT).as_posix() for name in packages for path in (ROOT / name).rglob("*.py")}
    experiments = {f"fedmed/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "experiments").rglob("*.yaml")}
    assert len(sources) > 100 and len(experiments) > 20
    assert sources | experiments <= names


def test_the_requirements_are_those_of_the_project() -> None:
    line = next(rest for word, rest in instructions() if word == "RUN" and "requirements.txt" in rest)
    code = shlex.split(line.partition(" > ")[0])
    assert code[:2] == ["python", "-c"]
    done = subprocess.run([sys.executable, "-c", code[2]], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert done.stdout.split("\n")[:-1] == [*project["dependencies"], *project["optional-dependencies"]["report"]]


# ---------------------------------------------------------------------- Compose itself


def test_compose_reads_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60).returncode:
        pytest.skip("no `docker compose` here")
    for profile in ("coordinator", *SITES, "rehearsal", "run", "setup"):
        command = [docker, "compose", "-f", "docker-compose.yml", "--profile", profile, "config", "--services"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == started(profile)
