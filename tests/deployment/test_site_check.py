"""`fedmed site check`, `keygen`, `status` and `leaves` as commands; the points of the check one by one."""

from __future__ import annotations

import datetime as dt
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedmed.cli.main import main
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.deployment import keys, site_check
from fedmed.deployment.probe import Finding
from fedmed.deployment.site_check import Point, check_site, class_counts, needed
from fedmed.deployment.site_config import SiteConfig, read_site_config
from fedmed.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., SiteConfig]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small site files by kind; `two` has two sites."""
    folder = tmp_path_factory.mktemp("data")
    made = {
        kind: make_phantom(folder / f"{kind}.h5", kind, num_sites=1, images_per_site=20, image_size=16)
        for kind in ("classification", "multilabel", "segmentation")
    }
    made["two"] = make_phantom(folder / "two.h5", "classification", num_sites=2, images_per_site=20, image_size=16)
    return made


@pytest.fixture
def site(tmp_path: Path, phantoms: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Make:
    """`site(**settings)`: a site made by `keygen` with everything right; settings replace keys of site.yaml."""

    def make(**settings: Any) -> SiteConfig:
        folder = tmp_path / "site"
        if not folder.exists():
            assert main(["site", "keygen", str(folder), "--name", "A"]) == 0
            keys.write_secret(folder / "ca.crt", keys.new_authority("test").public)
            capsys.readouterr()
        values = {
            "name": "A", "data": phantoms["classification"], "coordinator": "localhost:1", "ca": "ca.crt", "key": "site.key",
            "state": "state", "device": "cpu", **settings,
        }  # fmt: skip
        (folder / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
        return read_site_config(folder / "site.yaml")

    return make


def points(config: SiteConfig) -> dict[str, Point]:
    """What the check finds, by point."""
    return {point.what: point for point in needed(config)}


# --- keygen ---------------------------------------------------------------------------------------------------------


def test_keygen_makes_a_pair_and_tells_what_to_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "site"
    assert main(["site", "keygen", str(folder), "--name", "A"]) == 0
    said = capsys.readouterr().out
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "site.key").stat().st_mode) == 0o600
    public = keys.read_public_key(folder / "site.pub")
    assert keys.read_site_key(folder / "site.key") == public and public.line.startswith("ecdsa-sha2-nistp384 ")
    assert public.fingerprint in said and str(folder / "site.pub") in said and "never send it" in said
    secret = (folder / "site.key").read_text().splitlines()[1]
    assert secret not in said and "PRIVATE" not in said


@pytest.mark.parametrize("file", ["site.key", "site.pub", "site.yaml"])
def test_keygen_writes_over_nothing(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / file).write_text("mine")
    assert main(["site", "keygen", str(tmp_path)]) == 2
    assert "exists; a key is not written over" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == "mine"


def test_keygen_refuses_a_folder_others_look_into_and_an_odd_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o755)
    assert main(["site", "keygen", str(tmp_path)]) == 2
    assert f"chmod 700 {tmp_path}" in capsys.readouterr().err
    assert main(["site", "keygen", str(tmp_path / "x"), "--name", "a\nb"]) == 2
    assert not (tmp_path / "x").exists()


def test_help_and_keygen_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedmed.cli.main import main\n"
        f"codes = [main(['site', '--help']), main(['site', 'keygen', {str(tmp_path / 'k')!r}])]\n"
        "print(codes, sorted({'torch', 'flwr', 'h5py', 'numpy', 'monai'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[0, 0] []"


# --- the command ----------------------------------------------------------------------------------------------------


def test_check_prints_one_line_per_point(
    site: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = site()
    file = str(config.key.with_name("site.yaml"))
    assert main(["site", "check", file]) == 2  # nothing listens there
    lines = capsys.readouterr().out.splitlines()
    words = ["site.yaml", "data", "classes", "device", "key", "certificate", "state", "disk", "versions", "coordinator"]
    assert [line[9:].split(":")[0] for line in lines] == words
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1].startswith(
        "problem  coordinator: nothing listens on"
    )
    assert "site 'A', coordinator localhost:1" in lines[0]
    assert "flwr 1.41" in lines[8] and "bundle " in lines[8] and "code " in lines[8]
    monkeypatch.setattr(site_check, "probe", lambda *_: Finding(True, "answer", "localhost:1 answers"))
    assert main(["site", "check", file]) == 0
    assert not config.state.exists()  # looking changes nothing


def test_the_check_before_a_start_is_the_needed_part(site: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = site()
    assert site_check.main([str(config.key.with_name("site.yaml"))]) == 0
    config = site(ca="none.crt")
    assert site_check.main([str(config.key.with_name("site.yaml"))]) == 2
    assert "problem  certificate: cannot read" in capsys.readouterr().out


# --- data -----------------------------------------------------------------------------------------------------------


def test_data_and_classes(site: Make, phantoms: dict[str, Path]) -> None:
    found = points(site())
    assert (
        found["data"].ok
        and "classification, 6 classes, 3 channels, 16 x 16 pixels; train 14, val 2, test 4" in found["data"].text
    )
    assert "annotation: label" in found["data"].text
    assert "few of" in found["classes"].text and found["classes"].ok
    with SiteFile.open(phantoms["classification"]) as file:
        data = file.site(file.sites[0].name)
    expected = [int((data.target[data.splits["train"]] == place).sum()) for place in range(6)]
    assert class_counts(data).tolist() == expected and sum(expected) == 14


def test_class_counts_of_labels_and_masks(phantoms: dict[str, Path]) -> None:
    for kind in ("multilabel", "segmentation"):
        with SiteFile.open(phantoms[kind]) as file:
            data = file.site(file.sites[0].name)
        target = data.target[data.splits["train"]]
        naive = [
            sum(bool(t[place]) if kind == "multilabel" else bool((t == place).any()) for t in target)
            for place in range(data.num_classes)
        ]
        assert class_counts(data).tolist() == naive


def test_of_several_sites_the_name_decides(site: Make, phantoms: dict[str, Path]) -> None:
    assert not points(site(data=phantoms["two"]))["data"].ok
    assert (
        "has 2 sites (phantom-00, phantom-01), none of which is 'A'" in points(site(data=phantoms["two"]))["data"].text
    )
    assert points(site(data=phantoms["two"], name="phantom-01"))["data"].ok


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_text("no hdf5"), "not an HDF5 file"),
        (lambda path: _edit(path, lambda f: f.attrs.__setitem__("layout_version", "0")), "layout_version must be"),
        (lambda path: _edit(path, lambda f: f["site_00"]["label"].__setitem__(3, 77)), "label of image 3 contains 77"),
        (lambda path: _edit(path, lambda f: f["site_00"].attrs.__setitem__("train_idx", np.zeros(0, int))), "the train split is empty"),
    ],
)  # fmt: skip
def test_a_broken_data_file(
    site: Make, phantoms: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    path = Path(shutil.copy(phantoms["classification"], tmp_path / "own.h5"))
    spoil(path)
    found = points(site(data=path))["data"]
    assert not found.ok and words in found.text and "\n" not in found.text


def _edit(path: Path, change: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def test_too_few_training_items_for_the_limit(site: Make) -> None:
    found = points(site(limits="{min_count: 15}"))
    assert not found["data"].ok and "fewer training items than limits.min_count=15" in found["data"].text


# --- key, certificate, folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(site: Make, mode: int) -> None:
    config = site()
    config.key.chmod(mode)
    found = points(config)["key"]
    assert not found.ok and f"chmod 600 {config.key}" in found.text


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is no private key"), (b"ecdsa-sha2-nistp384 AAAA", "is no private key"),
     (b"-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n-----END OPENSSH PRIVATE KEY-----\n", "damaged")],
)  # fmt: skip
def test_what_is_no_key(site: Make, content: bytes, words: str) -> None:
    config = site()
    keys.write_secret(config.key, content)
    found = points(config)["key"]
    assert not found.ok and words in found.text


def test_the_authoritys_certificate(site: Make, tmp_path: Path) -> None:
    config = site()
    assert points(config)["certificate"].ok and "SHA-256 " in points(config)["certificate"].text
    authority = keys.new_authority("old", days=-1)
    keys.write_secret(config.ca, authority.public)
    assert "expired on" in points(config)["certificate"].text and not points(config)["certificate"].ok
    keys.write_secret(config.ca, keys.new_server_certificate(authority, ["localhost"]).public)
    assert "not that of an authority" in points(config)["certificate"].text
    soon = keys.new_authority("soon", days=10)
    keys.write_secret(config.ca, soon.public)
    assert "(in 10 days: ask for a new one)" in points(config)["certificate"].text
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=10)
    assert f"valid until {end:%Y-%m-%d}" in points(config)["certificate"].text


def test_the_state_folder(site: Make) -> None:
    config = site()
    assert "does not exist yet" in points(config)["state"].text
    config.state.mkdir(mode=0o700)
    assert points(config)["state"].ok
    config.state.chmod(0o750)
    assert f"chmod 700 {config.state}" in points(config)["state"].text
    config.state.rmdir()
    config.state.write_text("")
    assert "is not a folder" in points(config)["state"].text


def test_disk_and_device(site: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "probe", lambda *_: Finding(True, "answer", ""))
    monkeypatch.setattr(site_check, "FREE_BYTES", 10**18)
    found = {point.what: point for point in check_site(site(device="cuda:99"))}
    assert not found["disk"].ok and "make room" in found["disk"].text
    assert not found["device"].ok and "device: auto" in found["device"].text
    assert "CPU, " in points(site())["device"].text


def test_another_flower(site: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "version", lambda name: "1.50.0")
    with pytest.raises(UserError, match=r"needs flwr 1\.41\.\*"):
        site_check._versions(site())
