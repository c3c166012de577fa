"""The demo ends by its own way, whatever signals come."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_done_on_leaving_is_done_to_its_end() -> None:
    program = """
import os, signal, sys
from demo.interrupts import LEAVE, interrupt_on_leave, uninterrupted
interrupt_on_leave()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit("a signal must interrupt")
except KeyboardInterrupt:
    with uninterrupted():
        for number in LEAVE:
            os.kill(os.getpid(), number)
try:
    os.kill(os.getpid(), signal.SIGHUP)
except KeyboardInterrupt:
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
