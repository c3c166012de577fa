"""The Python environment of a job: the packages that its `requirements.txt` names, on top of the platform's packages.

pip sees the platform's packages through a path file: what is there and fits is not installed again, torch among it;
what is pinned otherwise goes before it. Installing runs code of the packages, so it happens in the program's room.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.isolation import outputs, owner, sandbox
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from trainers.programs.pip_settings import pip_settings
from trainers.programs.program_log import ProgramLog
from tunesmith import caches
from tunesmith.errors import SpecError
from tunesmith.settings import Settings

LOCK = "requirements.lock"
MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True)
class Environment:
    """Where a job's Python lies."""

    python: Path
    folder: Path | None
    """None where the job uses the platform's own environment."""
    lock: str | None
    """The installed packages as lines of NAME==VERSION with hashes; the platform's packages stand in comments."""


def own_environment(
    requirements: Path,
    *,
    account: str,
    settings: Settings,
    log: ProgramLog,
    watch: Callable[[Program], None],
    memory_bytes: int | None = None,
) -> Environment:
    """The environment for this requirements.txt, built where no job of the account has built it on this node before.

    `watch` waits for the installation's end and raises what keeps it from going on; `memory_bytes` is what the kernel
    lets it hold. SpecError where it fails.
    What runs in the installation writes to the environment, so nothing in there is opened through a link.
    """
    if not requirements.is_file() or not requirements.read_text(encoding="utf-8-sig").strip():
        return Environment(Path(sys.executable), None, None)
    folder = settings.home / "cache" / "environments" / account / _key(requirements)
    folder.parent.mkdir(parents=True, exist_ok=True)
    caches.hold(folder)
    with locked(folder.with_suffix(".lock")):
        if not (folder / LOCK).is_file():
            try:
                _build(folder, requirements, settings=settings, log=log, watch=watch, memory_bytes=memory_bytes)
            except BaseException:
                caches.delete(folder)
                raise
        else:
            log.write(b"the environment of these requirements is there already")
    caches.keep_bounds(settings)
    packages = folder / "packages"
    return Environment(packages / "bin" / "python", packages, (folder / LOCK).read_text())


def _build(
    folder: Path,
    requirements: Path,
    *,
    settings: Settings,
    log: ProgramLog,
    watch: Callable[[Program], None],
    memory_bytes: int | None,
) -> None:
    caches.delete(folder)
    packages, source, temporary = (folder / name for name in ("packages", "source", "tmp"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", packages], check=True, capture_output=True)
    (place,) = packages.glob("lib/python*/site-packages")
    paths = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (place / "platform.pth").write_text("".join(f"{path}\n" for path in paths))
    # What lies beside the requirements may be a package's source, which is built where it lies.
    shutil.copytree(requirements.parent, source)
    temporary.mkdir()
    pip = pip_settings()
    for host in pip.logins_dropped:
        log.write(f"pip is not given the login of this node for {host}: every package could read it".encode())
    # The program's own folder is written to, so pip lies in the platform's, where it cannot be changed.
    command = [str(packages / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-color", "--progress-bar", "off"]
    command += ["--report", str(packages / "report.json"), "-r", requirements.name]
    room = Room(
        readable=pip.readable,
        writable=[packages, source],
        temporary=temporary,
        network="node",
        resources={},
        largest_file_bytes=settings.program_disk_gib << 30,
        memory_bytes=memory_bytes,
    )
    program = Program(sandbox.launch(command, cwd=source, room=room, variables=pip.variables, settings=settings))
    with log.following(program):
        watch(program)
        code = program.exit_code()
    if code != 0:
        raise SpecError(
            f"requirements.txt could not be installed (pip ended with exit code {code}); its last lines:\n{log.tail()}",
            hint="the log of the worker has all that pip said",
            code="requirements_failed",
        )
    for left in (source, temporary):
        caches.delete(left)
    owner.take_back([packages])
    partial = folder / f"{LOCK}.partial"
    partial.write_text(lock(packages))
    partial.replace(folder / LOCK)


def _key(requirements: Path) -> str:
    """A hash of the requirements, the files beside them, the interpreter and the platform's packages."""
    sha256 = hashlib.sha256(sys.version.encode())
    for line in _platform_packages():
        sha256.update(line.encode() + b"\n")
    for path in sorted(
        p for p in requirements.parent.rglob("*") if p.is_file() and p != requirements.with_name("train.py")
    ):
        sha256.update(f"{path.relative_to(requirements.parent)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()[:32]


def lock(packages: Path) -> str:
    """The lock file, made from pip's report. SpecError where a package has replaced the report by something else."""
    lines = []
    try:
        with outputs.opened(packages, "report.json") as (descriptor, status):
            if status.st_size > MAX_REPORT_BYTES:
                raise ValueError(f"it has {status.st_size} bytes")
            report = json.loads(os.pread(descriptor, MAX_REPORT_BYTES, 0))
        for item in report["install"]:
            hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
            line = f"{item['metadata']['name']}=={item['metadata']['version']}"
            line += "".join(f" --hash={kind}:{digest}" for kind, digest in sorted(hashes.items()))
            lines.append(line.encode().decode())  # JSON may hold what is no text
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SpecError(
            f"what pip reports of requirements.txt cannot be read: {type(error).__name__}: {str(error)[:200]}",
            hint="a package of it has written there while it was installed",
            code="requirements_failed",
        ) from error
    there = [f"# the platform's: {line}" for line in _platform_packages()]
    return "\n".join([*sorted(lines), f"# Python {sys.version.split()[0]}", *there]) + "\n"


def _platform_packages() -> list[str]:
    found = importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]])
    return sorted({f"{each.metadata['Name']}=={each.version}" for each in found})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an environment, so that only one process of this node builds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
