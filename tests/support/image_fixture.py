"""An image of Debian's own packages, made on this machine, as an archive that podman takes."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from trainers.isolation.bubblewrap import IsolationError
from trainers.programs.images import find_podman
from tunesmith.settings import Settings

# Packages are unpacked and not set up: that takes longer than all the rest, and nothing here needs it.
DEBOOTSTRAP = ["debootstrap", "--foreign", "--variant=minbase", "--include=python3", "bookworm"]
UNUSED = ("debootstrap", "proc", "var/cache/apt", "var/lib/apt", "usr/share/doc", "usr/share/locale", "usr/share/man")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the image is slow: it takes half a minute to make."""
    for item in items:
        if "debian_image" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> None:
    """podman works here; else the test is skipped, or fails where IMAGES_REQUIRED is set."""
    home = tmp_path_factory.mktemp("podman")
    try:
        find_podman(Settings.from_env({"TUNESMITH_HOME": str(home)}))
    except IsolationError as error:
        _skip(f"{error.message}; tests/podman.sh installs it")


@pytest.fixture(scope="session")
def debian_image(podman: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A docker-archive: a small Debian with python3, and `FROM_IMAGE=yes` in its environment.

    DEBIAN_IMAGE names one that root has made before, for an ordinary user.
    """
    if made := os.environ.get("DEBIAN_IMAGE"):
        return Path(made)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0 or shutil.which("debootstrap", path=path) is None:
        _skip("a Debian image is made by debootstrap, as root; tests/podman.sh installs it")
    folder = tmp_path_factory.mktemp("debian")
    root = folder / "root"
    done = subprocess.run(
        [*DEBOOTSTRAP, str(root)], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        _skip(f"debootstrap could not make an image: {done.stdout[-500:]}{done.stderr[-500:]}")
    # debootstrap itself has unpacked only what every Debian needs.
    packages = root / "var/cache/apt/archives"
    for package in (*packages.glob("*python3*.deb"), *packages.glob("libexpat1_*.deb")):
        files = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
        # `lib` is a link to `usr/lib`, and a folder in some packages.
        subprocess.run(["tar", "--keep-directory-symlink", "-C", root, "-x"], input=files, check=True)
    for name in UNUSED:
        # In between, `proc` is a link to the system's own.
        (root / name).unlink() if (root / name).is_symlink() else shutil.rmtree(root / name)
    archive = make_archive(folder / "debian.tar", root, Env=["PATH=/usr/bin:/bin", "FROM_IMAGE=yes"])
    shutil.rmtree(root)
    return archive


def make_archive(path: Path, root: Path, **config: Any) -> Path:
    """Write an image with the files below `root` as its one layer, in the form of `docker save`."""
    layer = path.with_suffix(".layer")
    subprocess.run(["tar", "--numeric-owner", "-C", root, "-cf", layer, "."], check=True)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    layers = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    image = json.dumps({"architecture": machine, "os": "linux", "config": config, "rootfs": layers}).encode()
    manifest = json.dumps([{"Config": "image.json", "RepoTags": None, "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as archive:
        archive.add(layer, "layer.tar")
        for name, data in (("image.json", image), ("manifest.json", manifest)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    layer.unlink()
    return path


def _skip(why: str) -> None:
    if os.environ.get("IMAGES_REQUIRED"):
        pytest.fail(why)
    pytest.skip(why)
