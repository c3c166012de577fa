"""How a benchmark's figures are written down: one JSON file and the raw log beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith.clock import utc_text

FOLDER = Path(__file__).with_name("results")
ROOT = FOLDER.parents[1]


def say(lines: list[str], line: str) -> None:
    """Print a line, and keep it for the raw log."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    lines.append(line)


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """The median of a figure's runs, with their range."""
    return {
        "value": statistics.median(values),
        "unit": unit,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def write_results(
    name: str, figures: Mapping[str, Mapping[str, Any]], log: str, *, folder: Path = FOLDER, device: str | None = None
) -> Path:
    """Write NAME.json and NAME.log to `folder`; the path of the first. `device` is the accelerator.

    The commit is marked `+changes` where the tree is not clean, and `unknown` outside a clone: such a file is not to be
    committed.
    """
    processor = _processor() if device is None else f"{device}, {_processor()}"
    document = {
        "benchmark": name,
        "commit": _commit(),
        "date": utc_text(),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions("torch", "ray", "transformers", "peft")},
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    path.with_suffix(".log").write_text(log)
    return path


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str:
    try:
        commit = _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    # The results themselves may differ: the program has just written them, or is about to.
    changes = [line for line in _git("status", "--porcelain").splitlines() if "benchmarks/results/" not in line]
    return f"{commit}+changes" if changes else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
