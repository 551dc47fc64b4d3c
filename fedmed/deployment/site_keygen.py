"""`fedmed site keygen`: a site's key pair, and a site.yaml to fill in."""

from __future__ import annotations

from pathlib import Path

from fedmed.deployment import keys
from fedmed.errors import UserError

PRIVATE, PUBLIC, SETTINGS = "site.key", "site.pub", "site.yaml"

TEMPLATE = """\
# One hospital's end of a federation. Paths are relative to this file.
# Fill in, then:  fedmed site check site.yaml    and    fedmed site start site.yaml

name: {name}                # what the federation calls this site; the coordinator approves its key under this name
data: data/site.h5          # the site file (HDF5); it is only read
coordinator: fl.example.org:8000   # name or address, and port, as the coordinator gives them: the certificate is for this name
ca: ca.crt                  # from the coordinator; compare its fingerprint by telephone (`fedmed site check` prints it)
key: site.key               # never leaves this machine
state: state                # all that this site keeps: personal models, scores by case, logs; only its owner may look inside
device: auto                # auto, cpu, cuda or cuda:0
# log: site.log             # default: logs/site.log in the state folder
# reconnect_hours: 24       # how long a lost connection is tried again before the site gives up
# bundles: []               # SHA-256 of run bundles that are allowed besides the one of this FedMed version

limits:                     # what a run may ask; beyond that this site refuses, and the coordinator is told why
  # max_epochs: 10          # passes over the training data in a round
  # max_steps: 1000         # optimiser steps in a round
  # methods: [supervised, fednoro]     # clients and add-ons (`fedmed list clients`, `fedmed list addons`)
  # experiments: [fednoro]             # experiments whose client part is left as it is installed here
  # min_count: 5            # least number of items a released statistic stands for; smaller splits keep their scores to themselves
  # allow_imports: []       # 'module:attribute' outside FedMed that a run may name; whoever names one runs its code here
"""


def keygen(folder: str | Path, name: str = "my-hospital") -> tuple[Path, keys.PublicKey]:
    """Write private key (0600), public key and site.yaml into a folder (0700); gives the folder and the public key.

    Raises `UserError` rather than write over a file, and for a folder that others may look into.
    """
    place = Path(folder).expanduser().resolve()
    there = [file for file in (PRIVATE, PUBLIC, SETTINGS) if (place / file).exists()]
    if there:
        raise UserError(f"{place / there[0]} exists; a key is not written over: choose another folder, or move it away")
    _check_name(name)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        keys.check_private(place, "the folder")
        pair = keys.new_site_key()
        keys.write_secret(place / PRIVATE, pair.private)
        keys.write_secret(place / PUBLIC, pair.public).chmod(0o644)
        keys.write_secret(place / SETTINGS, TEMPLATE.format(name=_yaml_word(name)).encode())
    except OSError as error:
        raise UserError(f"cannot write into {place}: {error.strerror}") from error
    return place, keys.read_public_key(place / PUBLIC)


def _check_name(name: str) -> None:
    from fedmed.deployment.site_config import LONGEST_NAME

    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= LONGEST_NAME:
        raise UserError(f"--name: expected one line of 1 to {LONGEST_NAME} characters, got {name!r}")


def _yaml_word(name: str) -> str:
    """The name as a YAML string, quoted where it would be read as something else."""
    import json
    import re

    return name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else json.dumps(name, ensure_ascii=False)
