"""What the pages name exists: links and their anchors, files, commands, configuration keys, functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from fedmed.config import Config, load_config, to_tree

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:fedmed|strategies|clients|data_prep|experiments|benchmarks|tests|docs)/[\w./-]*")
_FILES = (".safetensors", ".json", ".yaml", ".md", ".py", ".h5")
_SECTIONS = set(to_tree(Config()))
_OPTIONS = {"--engine": 1, "--out": 1, "--resume": 0, "--quiet": 0, "--debug": 0}


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def missing_links(pages: dict[str, str], root: Path) -> list[str]:
    missing = []
    for page, text in pages.items():
        for link in _LINK.findall(without_fences(text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (root / page).parent / path if path else root / page
            if not target.exists():
                missing.append(f"{page}: {link}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                missing.append(f"{page}: {link} (no such heading)")
    return missing


def test_links_lead_somewhere(pages: dict[str, str], root: Path) -> None:
    assert missing_links(pages, root) == []


def test_a_broken_link_is_found(root: Path) -> None:
    page = {"docs/x.md": "[a](nowhere.md) [b](guide.md#resume) [c](guide.md#nothing) [d](https://flower.ai)"}
    assert missing_links(page, root) == ["docs/x.md: nowhere.md", "docs/x.md: guide.md#nothing (no such heading)"]


def test_files_in_backticks_exist(pages: dict[str, str], root: Path) -> None:
    named = {(page, word) for page, text in pages.items() for word in _CODE.findall(without_fences(text))}
    missing = [(page, word) for page, word in sorted(named) if _PATH.fullmatch(word) and not (root / word).exists()]
    assert missing == []


def test_functions_in_backticks_exist(pages: dict[str, str], root: Path) -> None:
    folders = ("fedmed", "strategies", "clients", "data_prep")
    source = "\n".join(p.read_text(encoding="utf-8") for folder in folders for p in (root / folder).rglob("*.py"))
    called = {
        (page, match[1])
        for page, text in pages.items()
        for word in _CODE.findall(without_fences(text))
        if (match := re.fullmatch(r"(?:\w+\.)*(\w+)\(\)", word))
    }
    assert called
    assert [(page, name) for page, name in sorted(called) if f"def {name}(" not in source] == []


def test_configuration_keys_in_backticks_exist(pages: dict[str, str]) -> None:
    def known(key: str) -> bool:
        node: object = to_tree(Config())
        for part in key.split("."):
            if not isinstance(node, dict):
                return False
            if not node:
                return True  # arguments of a method: checked where they are used
            if part not in node:
                return key.startswith(("client.prox", "client.npr"))
            node = node[part]
        return True

    wrong = []
    for page, text in pages.items():
        for word in _CODE.findall(without_fences(text)):
            key = word.partition("=")[0]
            is_key = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and not key.endswith(_FILES)
            if is_key and key.split(".")[0] in _SECTIONS and not known(key):
                wrong.append(f"{page}: {word}")
    assert wrong == []


def commands(pages: dict[str, str], blocks: Callable[[str, str], list[str]], program: str) -> list[tuple[str, str]]:
    """(page, command) for every command line of a program in the shell blocks, continuation lines joined."""
    found = []
    for page, text in pages.items():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                bare = re.sub(r"^(?:\w+=\S* )+", "", line.strip())
                if bare.startswith(f"{program} "):
                    found.append((page, bare))
    return found


def positional(line: str) -> list[str]:
    """Words of a `fedmed run` line without program, options and comment."""
    words, kept = shlex.split(line, comments=True)[2:], []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            del words[: _OPTIONS[word]]
        else:
            kept.append(word)
    return kept


def test_runs_in_shell_blocks_are_valid(pages: dict[str, str], blocks: Callable[[str, str], list[str]]) -> None:
    lines = [positional(line) for _, line in commands(pages, blocks, "fedmed run") if "EXPERIMENT" not in line]
    assert len(lines) > 10
    for experiment, *overrides in lines:
        if not experiment.endswith(".yaml"):
            load_config(experiment, overrides)


def test_make_targets_exist(pages: dict[str, str], blocks: Callable[[str, str], list[str]], root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {
        word
        for _, line in commands(pages, blocks, "make")
        for word in shlex.split(line, comments=True)[1:]
        if "=" not in word
    }
    assert used and used <= targets


def test_flwr_run_uses_keys_that_exist(
    pages: dict[str, str], blocks: Callable[[str, str], list[str]], root: Path
) -> None:
    import tomllib

    keys = set(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])
    lines = commands(pages, blocks, "flwr run")
    assert any(page == "README.md" for page, _ in lines)
    for _, line in lines:
        words = shlex.split(line)
        given = shlex.split(words[words.index("-c") + 1])
        settings = dict(word.split("=", 1) for word in given)
        assert set(settings) <= keys
        load_config(settings["experiment"], shlex.split(settings.get("overrides", "")))
