"""Names that say nothing: keyed hashes of file and patient names, the key they need, and files that only their owner can read."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from fedmed.errors import UserError

KEY_BYTES = 32
DIGITS = 16  # hexadecimal; among a million names, two meet with probability 3e-8
GROUP_AND_OTHERS = 0o077


class Ids:
    """Gives item_id and group_id: 16 hexadecimal digits of HMAC-SHA256 under the site's key. The same key and name give the same id.

    Items and groups are hashed apart, so a patient and a file of the same name do not show it.
    """

    def __init__(self, key: bytes) -> None:
        """key: 32 bytes."""
        self._item = hmac.new(key, b"fedmed item\0", hashlib.sha256)
        self._group = hmac.new(key, b"fedmed group\0", hashlib.sha256)

    def item(self, name: str, place: int | None = None) -> str:
        """Id of a file, or of the image at `place` in it."""
        return _digest(self._item, name if place is None else f"{name}\0{place}")

    def group(self, name: str) -> str:
        """Id of a patient, lesion or volume."""
        return _digest(self._group, name)


def _digest(keyed: hmac.HMAC, name: str) -> str:
    mac = keyed.copy()
    mac.update(name.encode("utf-8", "surrogateescape"))
    return mac.hexdigest()[:DIGITS]


def default_key_path() -> Path:
    """Where the key lies unless `--secret` names another file."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "fedmed" / "import.key"


def load_key(path: Path) -> tuple[bytes, bool]:
    """Read the key, making the file when there is none; give it and whether it is new. Raises UserError, which never quotes the content."""
    made = False
    if not path.exists():
        made = _publish(path, f"{secrets.token_hex(KEY_BYTES)}\n".encode())
    try:
        facts = path.stat()
        content = (
            path.read_bytes() if stat.S_ISREG(facts.st_mode) and facts.st_size < 1024 else b""
        )  # a device may never end
    except OSError as error:
        raise UserError(f"cannot read the import key {path}: {error.strerror}") from error
    try:
        key = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} is no import key; expected {2 * KEY_BYTES} hexadecimal digits. Give another file with --secret."
        )
    if stat.S_IMODE(facts.st_mode) & GROUP_AND_OTHERS:  # asked last, so that chmod is advised for keys only
        mode = f"{stat.S_IMODE(facts.st_mode):04o}"
        raise UserError(f"the import key {path} may be read or changed by others (mode {mode}): chmod 600 {path}")
    return key, made


def _publish(path: Path, content: bytes) -> bool:
    """Write a new file of mode 0600, complete or not at all; False when another process was first, whose file then stays."""
    partial = _partial(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(partial, content)
        os.link(partial, path)  # unlike a rename, never replaces a key
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"cannot write the import key {path}: {error.strerror}. Give another file with --secret."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_private(path: Path, content: bytes, what: str) -> None:
    """Write a file that only its owner can read, complete or not at all, in the place of an older one. Raises UserError."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, content)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the {what} {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
