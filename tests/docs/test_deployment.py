"""`docs/deployment.md` against the code: every command line, settings file, error text and number in it."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer
import yaml

from fedmed.cli.main import app
from fedmed.config import Config, load_config
from fedmed.deployment import coordinator, coordinator_folder, executor, keys, supervise
from fedmed.deployment.limits import check
from fedmed.deployment.site_config import SiteConfig, read_site_config
from fedmed.deployment.site_facts import Facts
from fedmed.engines import flower_tasks
from fedmed.errors import UserError

PAGE = "docs/deployment.md"
# Texts of the troubleshooting table that are not FedMed's: Flower's, Docker's, the system's.
_FOREIGN = {"Node Unavailable", "bind source path does not exist", "Permission denied"}
_SHORTEST = 12  # letters of a piece of text that is looked for


@pytest.fixture(scope="module")
def command_lines() -> ModuleType:
    """The module `tests/deployment/command_lines.py` (test folders are no packages, hence by path)."""
    path = Path(__file__).resolve().parents[1] / "deployment" / "command_lines.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(pages: dict[str, str]) -> str:
    """The text of the page."""
    return pages[PAGE]


@pytest.fixture
def services(root: Path) -> dict[str, dict[str, Any]]:
    """The services of docker-compose.yml, variables as they stand."""
    return dict(yaml.safe_load((root / "docker-compose.yml").read_text(encoding="utf-8"))["services"])


Blocks = Callable[[str, str], list[str]]


# ---------------------------------------------------------------------- command lines


def test_command_lines_parse(pages: dict[str, str], blocks: Blocks, command_lines: ModuleType) -> None:
    found: dict[str, set[str]] = {}
    for name, text in pages.items():
        for block in [*blocks(text, "sh"), *blocks(text, "bash")]:
            for words in command_lines.in_shell(block):
                if not {"--version", "--list"} & set(words):  # these answer while they are parsed
                    found.setdefault(name, set()).add(command_lines.parse(words).command)
    ends = {f"coordinator {verb}" for verb in ("init", "start", "approve", "status", "renew", "revoke")}
    ends |= {f"site {verb}" for verb in ("keygen", "check", "start", "leaves")}
    assert found[PAGE] >= {*ends, "run"}
    assert found["README.md"] >= {"coordinator init", "coordinator start", "site keygen", "site start", "run"}


def test_runs_name_settings_that_exist(page: str, blocks: Blocks, command_lines: ModuleType) -> None:
    lines = [words for block in blocks(page, "sh") for words in command_lines.in_shell(block, "fedmed run")]
    assert len(lines) == 2
    for words in lines:
        values = command_lines.parse(words).values
        config = load_config(values["experiment"], [*values["overrides"], f"engine.name={values['engine']}"])
        assert config.engine.name == "deployment" and values["coordinator"]
    first, again = lines
    assert again[: len(first)] == first and again[-1] == "--resume"  # resuming takes the words of the first run


def test_the_site_of_the_walk_through_lets_its_run_in(
    page: str, blocks: Blocks, command_lines: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    limits = read_site_config(tmp_path / "site.yaml").limits
    words = next(words for block in blocks(page, "sh") for words in command_lines.in_shell(block, "fedmed run"))
    values = command_lines.parse(words).values
    check(limits, load_config(values["experiment"], values["overrides"]), Facts("mercy", 100))
    with pytest.raises(UserError, match="min_count"):
        check(limits, load_config(values["experiment"]), Facts("mercy", 100))


def test_commands_in_the_text_exist(pages: dict[str, str]) -> None:
    """Those in backticks, which may leave arguments out."""
    found = 0
    for name in (PAGE, "README.md", "docs/privacy.md", "docs/engines.md"):
        text = re.sub(r"^```.*?^```$", "", pages[name], flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`(fedmed (?:coordinator|site|run)\b[^`\n]*)`", text):
            command: click.Command = typer.main.get_command(app)
            for word in shlex.split(code)[1:]:
                if isinstance(command, click.Group):
                    assert word in command.commands, code
                    command = command.commands[word]
                elif word.startswith("--"):
                    assert any(word in parameter.opts for parameter in command.params), code
                found += 1
    assert found > 20


def test_docker_commands_name_services_that_exist(
    page: str, blocks: Blocks, command_lines: ModuleType, services: dict[str, dict[str, Any]]
) -> None:
    verbs = set()
    for block in blocks(page, "sh"):
        for words in command_lines.in_shell(block, "docker compose"):
            verb, rest = words[2], [word for word in words[3:] if word not in ("--rm", "-d")]
            verbs.add(verb)
            if rest:
                assert rest[0] in services
            if verb == "run" and rest[1:]:
                command_lines.parse([*services[rest[0]]["entrypoint"], *rest[1:]])
            elif verb == "exec":
                command_lines.parse(rest[1:])
    assert verbs == {"run", "up", "logs", "ps", "exec", "restart"}


def test_the_service_of_the_system_parses(page: str, blocks: Blocks, command_lines: ModuleType) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", page, flags=re.MULTILINE)
    program, *words = line.split()
    assert command_lines.parse([Path(program).name, *words]).command == "site start"
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", page, flags=re.MULTILINE)
    assert int(seconds) > supervise.GRACE_S


# ---------------------------------------------------------------------- settings


def test_env_files_fit_the_compose_file(
    page: str, blocks: Blocks, root: Path, services: dict[str, dict[str, Any]]
) -> None:
    compose = (root / "docker-compose.yml").read_text(encoding="utf-8")
    files = [block for block in blocks(page, "ini") if "COMPOSE_PROFILES" in block]
    assert len(files) == 2
    for block in files:
        values = dict(line.split("=", 1) for line in block.splitlines())
        assert {profile for service in services.values() for profile in service["profiles"]} >= {
            values.pop("COMPOSE_PROFILES")
        }
        assert not values["FEDMED_USER"].startswith("0")
        for name in values:
            assert f"${{{name}:-" in compose
    assert "`COMPOSE_PROFILES=rehearsal`" in page
    assert f"docker build -t {services['run']['image'].partition(':-')[2].rstrip('}')} ." in page


def test_yaml_files_are_read(page: str, blocks: Blocks, tmp_path: Path, services: dict[str, dict[str, Any]]) -> None:
    site, override = blocks(page, "yaml")
    (tmp_path / "site.yaml").write_text(site, encoding="utf-8")
    config = read_site_config(tmp_path / "site.yaml")
    assert isinstance(config, SiteConfig) and config.name == "mercy" and config.limits.max_epochs == 5
    assert set(yaml.safe_load(override)["services"]) <= set(services)


def test_the_rehearsal_gets_its_site_files(
    page: str, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmed.data.site_file import SiteFile

    monkeypatch.chdir(tmp_path)
    sites = ("site-a", "site-b", "site-c")
    for site in sites:
        (tmp_path / site / "data").mkdir(parents=True)
    (code,) = blocks(page, "python")
    exec(compile(code.replace("images_per_site=60", "images_per_site=10, image_size=16"), PAGE, "exec"), {})
    for site in sites:
        with SiteFile.open(tmp_path / site / "data" / "site.h5") as file:
            assert len(file.sites) == 1 and file.sites[0].n_train > 0


# ---------------------------------------------------------------------- texts and numbers


@pytest.fixture(scope="module")
def said() -> str:
    """Every string in the code, as far as it is written down: the parts of f-strings, bytes as text."""
    root = Path(__file__).resolve().parents[2]
    found = []
    for path in sorted((root / "fedmed").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
                found.append(node.value if isinstance(node.value, str) else node.value.decode("latin-1"))
    return "\n".join(found)


def test_error_texts_are_those_of_the_code(page: str, said: str) -> None:
    table = page.partition("## Troubleshooting")[2]
    texts = [row.split("`")[1] for row in re.findall(r"^\| `.*$", table, flags=re.MULTILINE)]
    assert len(texts) > 30 and set(texts) >= _FOREIGN
    for text in set(texts) - _FOREIGN:
        pieces = [piece.strip() for piece in text.split("...")]
        known = [piece for piece in pieces if len(piece) >= _SHORTEST]
        assert known, f"too short to be found: {text}"
        assert [piece for piece in known if piece not in said] == [], text


def test_lines_quoted_in_the_text_are_those_of_the_code(page: str, said: str) -> None:
    for text in (
        "connected to the coordinator",
        "this address serves sites only; the coordinator's own machine alone may control it",
    ):
        assert f"`{text}`" in page and text in said
    assert "`ready: site 'mercy'`" in page and "ready: site %r" in said


def test_numbers_are_those_of_the_code(page: str) -> None:
    assert f"good for {coordinator_folder.SERVER_DAYS} days" in page
    assert keys.AUTHORITY_DAYS // 365 == 10 and "the authority for ten years" in page
    assert f"warns {coordinator.RENEW_DAYS} days before" in page
    assert f"At most {supervise.LOG_BYTES * supervise.LOG_FILES // 10**6} MB" in page
    assert f"takes less than {executor.GRACE_S:g} s" in page
    assert f"after {coordinator.GIVE_UP_S / 60:g} minutes (coordinator)" in page
    assert f"1, 2, 4 ... {supervise.LONGEST_DELAY_S:g} s" in page
    assert all(f"`{path.rstrip('/')}" in page for path in flower_tasks.ALLOWED_PATHS)


def test_defaults_are_those_of_the_configuration(page: str) -> None:
    for key, shown in re.findall(r"^\| `(\w+\.\w+)` \(`?([\w.]+)`?\) \|", page, flags=re.MULTILINE):
        section, name = key.split(".")
        assert f"{getattr(getattr(Config(), section), name)}".removesuffix(".0") == shown
    assert page.count("| `federation.") == 2


def test_files_of_both_folders_are_those_of_the_code(page: str, tmp_path: Path) -> None:
    folder = coordinator_folder.CoordinatorFolder.create(tmp_path / "coordinator", ["localhost"])
    for path in (
        folder.database,
        folder.log_file,
        folder.authority_key,
        folder.ca_file,
        folder.sites_file,
        folder.runs,
    ):
        assert f"`{path.relative_to(folder.path).as_posix()}{'/' if path.is_dir() else ''}`" in page
