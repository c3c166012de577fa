"""A storage without room is called that, by the error, by the driver's end and by what Ray says of it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.reconciler import launcher
from trainers import driver
from trainers.isolation.bubblewrap import find_bubblewrap
from tunesmith.errors import EXIT_STORAGE_FULL, STORAGE_FULL, StorageError
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage

FULL = """
import errno, os, pathlib, subprocess, sys
root = pathlib.Path(sys.argv[1])
from tunesmith.errors import StorageError
from tunesmith.storage.folder import FolderStorage
storage = FolderStorage(root)
storage.put("jobs/job-1/job.json", pathlib.Path(sys.argv[2]).read_bytes())
(root / "big").write_bytes(b"")
try:
    with (root / "big").open("ab", buffering=0) as file:
        while True:
            file.write(b"1" * 4096)
except OSError as error:
    assert error.errno == errno.ENOSPC
(root / "data").mkdir(exist_ok=True)
try:
    storage.put("data/a", b"1" * 100_000)
except StorageError as error:
    print(error.code, error.message)
os.environ["TUNESMITH_STORAGE_PATIENCE_S"] = "0"
sys.exit(subprocess.call([sys.executable, "-m", "trainers", f"{root}/jobs/job-1/job.json"]))
"""


def in_a_small_storage(folder: Path, code: str, *given: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a file system of 1 MiB at `folder`."""
    command = [find_bubblewrap(), "--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--size", str(1 << 20)]
    command += ["--tmpfs", str(folder), "--", sys.executable, "-c", code, str(folder), *given]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_driver_whose_storage_is_full_ends_with_a_code_that_says_so(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(
        '{"kind": "register", "id": "job-1", "account": "operator", "name": "rows", "asset": "dataset",'
        f' "source": "{tmp_path}", "task_type": null, "created_at": "2026-01-01T00:00:00.000Z",'
        ' "output_asset": "rows@1"}'
    )
    (tmp_path / "storage").mkdir()
    done = in_a_small_storage(tmp_path / "storage", FULL, str(job))
    assert done.stdout.startswith("storage_full data/a could not be written"), done.stderr
    assert (done.returncode, "storage_full: " in done.stderr) == (EXIT_STORAGE_FULL, True), done.stderr


def test_what_ray_says_of_that_code_names_the_full_storage() -> None:
    said = f"Job entrypoint command failed with exit code {EXIT_STORAGE_FULL}, last available logs (truncated):\nx"
    assert launcher._first_line(said) == (
        f"the storage is full: Job entrypoint command failed with exit code {EXIT_STORAGE_FULL}"
    )


def test_a_full_storage_is_given_up_long_before_one_that_is_away(tmp_path: Path) -> None:
    waited = {}
    for code in (STORAGE_FULL, None):
        now = [0.0]

        def pause(seconds: float, now: list[float] = now) -> None:
            now[0] += seconds

        storage = PatientStorage(
            FolderStorage(tmp_path),
            patience_s=600,
            pause=pause,
            clock=lambda now=now: now[0],  # type: ignore[misc]
        )

        def fails(code: str | None = code) -> None:
            raise StorageError("no", code=code)

        with pytest.raises(StorageError):
            storage.patiently(fails)
        waited[code] = now[0]
    assert waited[STORAGE_FULL] <= 60 < 500 < waited[None]


def test_a_disk_that_a_library_found_full_is_named_too() -> None:
    named = driver._named(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/home/x"))
    assert isinstance(named, StorageError) and named.code == STORAGE_FULL
    other = OSError(errno.EACCES, "no")
    assert driver._named(other) is other
