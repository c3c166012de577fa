"""A test run comes to its end, whatever a failing test leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANGS = """
import time

from tests.support import workers

LEFT = []


def test_that_fails() -> None:
    LEFT.append(workers.process(time.sleep, 10_000))
    LEFT[0].__enter__()
    raise AssertionError("it leaves a process behind")
"""


@pytest.mark.slow
def test_a_process_that_a_failing_test_leaves_does_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_hangs.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it leaves a process behind" in done.stdout
