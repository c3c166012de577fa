"""pip's settings of the node go into a room without its secrets."""

from pathlib import Path

import pytest

from trainers.programs.pip_settings import pip_settings, settings_for_rooms


@pytest.mark.parametrize(
    ("name", "address", "inside"),
    [
        ("index-url", "https://me:s3cret@host.org/simple", "https://host.org/simple"),
        ("index-url", "https://s3cret@host.org:8443/a?b=c", "https://host.org:8443/a?b=c"),
        ("extra-index-url", "https://a.org/x\nhttps://me:s3cret@host.org/y", "https://a.org/x https://host.org/y"),
        ("find-links", "https://me:s3%40cret@host.org/wheels", "https://host.org/wheels"),
        ("find-links", "https://me:s3cret@oh@host.org/wheels", "https://host.org/wheels"),
        ("proxy", "http://me:s3cret@host.org:3128", "http://host.org:3128"),
        ("index-url", "https://host.org/simple", "https://host.org/simple"),
    ],
)
def test_an_address_goes_inside_without_its_login(name: str, address: str, inside: str) -> None:
    found = settings_for_rooms({name: address})
    assert dict(found.variables) == {f"PIP_{name.upper().replace('-', '_')}": inside}
    assert bool(found.logins_dropped) == ("@" in address)
    assert "cret" not in repr(found)


@pytest.mark.parametrize(
    "name", ["client-cert", "keyring-provider", "password", "log", "cache-dir", "target", "prefix"]
)
def test_settings_that_are_not_about_packages_stay_outside(name: str) -> None:
    found = settings_for_rooms({name: "/etc/shadow"})
    assert (dict(found.variables), found.readable) == ({}, ())


def test_folders_that_are_named_can_be_read_inside(tmp_path: Path) -> None:
    for name in ("wheels", "simple"):
        (tmp_path / "pypi" / name).mkdir(parents=True)
    links, index = tmp_path / "pypi" / "wheels", (tmp_path / "pypi" / "simple").as_uri()
    found = settings_for_rooms({"find-links": f"{links} /usr/share {tmp_path}/none", "index-url": index})
    assert found.readable == (tmp_path / "pypi", links)
    assert settings_for_rooms({"index-url": "file:///etc"}).readable == ()


def test_pip_itself_says_what_the_node_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = https://me:s3cret@a.org/simple\ntimeout = 7\n[install]\nno-binary = one\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_TIMEOUT", "9")
    found = pip_settings()
    assert {"PIP_INDEX_URL": "https://a.org/simple", "PIP_NO_BINARY": "one"}.items() <= found.variables.items()
    assert found.variables["PIP_TIMEOUT"] == "9", "a variable counts more than a file"
    assert found.logins_dropped == ("a.org",)
