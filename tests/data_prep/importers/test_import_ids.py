"""Keyed ids: stable, apart, not to be guessed without the key; the key file is made once and kept private."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest

from data_prep.importers.ids import Ids, default_key_path, load_key, write_private
from fedmed.errors import UserError

KEY = bytes(range(32))


def test_ids_are_hmac_sha256_with_items_and_groups_apart() -> None:
    ids = Ids(KEY)
    assert ids.item("DOE") == hmac.new(KEY, b"fedmed item\0DOE", hashlib.sha256).hexdigest()[:16]
    assert ids.group("DOE") == hmac.new(KEY, b"fedmed group\0DOE", hashlib.sha256).hexdigest()[:16]
    names = {ids.item("a"), ids.item("a", 0), ids.item("a", 1), ids.group("a"), Ids(KEY[::-1]).item("a")}
    assert len(names) == 5 and ids.item("a") == Ids(KEY).item("a")


def test_names_that_are_no_unicode_have_ids_too() -> None:
    assert len(Ids(KEY).item(os.fsdecode(b"caf\xe9.png"))) == 16


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "import.key"
    key, made = load_key(path)
    assert made and len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_key(path) == (key, False)
    assert [child.name for child in path.parent.iterdir()] == ["import.key"]


def test_a_key_made_by_another_process_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "import.key"
    link = os.link

    def late(source: str, target: Path) -> None:
        write_private(path, KEY.hex().encode(), "key")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert load_key(path) == (KEY, False)
    assert [child.name for child in tmp_path.iterdir()] == ["import.key"]


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "import.key"
    load_key(path)
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"mode 0640\): chmod 600"):
        load_key(path)


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"zz" * 32, b"\xff" * 40, b"0" * 5000])
def test_a_file_that_is_no_key_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "import.key"
    write_private(path, content, "key")
    with pytest.raises(UserError, match="is no import key; expected 64 hexadecimal digits") as error:
        load_key(path)
    assert "zz" not in str(error.value)
    path.chmod(0o644)  # what is no key is never to be given another mode
    with pytest.raises(UserError, match="is no import key"):
        load_key(path)


def test_where_the_key_lies_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_key_path() == tmp_path / "fedmed" / "import.key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_key_path() == tmp_path / "home" / ".config" / "fedmed" / "import.key"


def test_a_folder_in_the_place_of_the_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no import key"):
        load_key(tmp_path)


def test_private_files_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new", "trace")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="cannot write the trace"):
        write_private(tmp_path / "trace.csv" / "below", b"", "trace")
