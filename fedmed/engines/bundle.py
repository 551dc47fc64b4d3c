"""The bundle handed to `flwr run`: a stub that imports the installed package, and the run config as a TOML file.

Flower ships the *sources* of an app to the processes that run it. A stub of constant content keeps the project tree out
of that: no run folders, notebooks or patient-derived files are swept up, the bundle hash never changes, and the code
that runs is the installed one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from fedmed.errors import UserError

SERVER_APP = "fedmed.server_app:app"
CLIENT_APP = "fedmed.client_app:app"

# Flower refuses a run-config key that pyproject.toml does not list.
RUN_CONFIG_DEFAULTS: dict[str, str | bool] = {
    "experiment": "",
    "overrides": "",
    "config": "",
    "out": "",
    "resume": False,
}

_PYPROJECT = """\
[project]
name = "fedmed-stub"
version = "1.0.0"
description = "Starts the installed FedMed package."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmed"

[tool.flwr.app.components]
serverapp = "fedmed_stub.server:app"
clientapp = "fedmed_stub.client:app"

[tool.flwr.app.config]
"""

# `flwr run` looks for a top-level assignment to `app` without executing the module; a bare import would not be seen.
_MODULE = """\
from {module} import {attribute} as _app

app = _app
"""


def toml_value(value: str | bool | int | float) -> str:
    r"""Write a scalar as a TOML value; strings become one-line basic strings.

    JSON's escapes (\" \\ \n \t \b \f \r \u00XX) are TOML's too; only U+007F, which JSON leaves bare, has to be added,
    and characters beyond U+FFFF stay as they are, since TOML knows no surrogate pairs. Raises `UserError` for a lone
    surrogate, which UTF-8 cannot carry.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the configuration holds a character that UTF-8 cannot write: {value[error.start]!r}"
        ) from error
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(values: Mapping[str, str | bool | int | float]) -> str:
    """Write a flat mapping as TOML, one `key = value` a line, keys in the given order."""
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())


def write_private(path: Path, text: str) -> Path:
    """Write a text file atomically, readable by its owner only."""
    partial = path.with_name(f"{path.name}.part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    partial.replace(path)
    return path


def write_stub(folder: Path, server: str = SERVER_APP, client: str = CLIENT_APP) -> Path:
    """Write the stub app into `folder` (made if absent) and give the folder back.

    `server` and `client` are import strings (`package.module:attribute`) of the installed apps. The content depends on
    them alone, so the bundle that Flower builds from it is byte-identical on every run and machine.
    """
    package = folder / "fedmed_stub"
    package.mkdir(parents=True, exist_ok=True)
    write_private(folder / "pyproject.toml", _PYPROJECT + to_toml(RUN_CONFIG_DEFAULTS))
    write_private(package / "__init__.py", '"""Starts the installed FedMed package under Flower."""\n')
    for name, target in (("server", server), ("client", client)):
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
            raise UserError(f"{name} app: expected package.module:attribute, got {target!r}")
        module, _, attribute = target.partition(":")
        write_private(package / f"{name}.py", _MODULE.format(module=module, attribute=attribute))
    return folder


def write_run_config(path: Path, config: str, out: Path, resume: bool) -> Path:
    """Write the run config (config as YAML text, run folder, resume) as the TOML file that `flwr run -c` reads."""
    return write_private(path, to_toml({"config": config, "out": str(out), "resume": resume}))
