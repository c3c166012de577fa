"""What a few steps of a training spend their time on, as a Chrome trace (chrome://tracing, https://ui.perfetto.dev)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.profiler

BEFORE, RECORDED = 2, 3
"""Steps before the recorded ones, and recorded steps."""


def traced(steps: Iterable[int], path: Path | None) -> Iterator[int]:
    """Yield `steps`. What the third to the fifth do, on the host and its accelerator, is written to `path`.

    A run that ends before the third step writes nothing.
    """
    if path is None:
        yield from steps
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=RECORDED, repeat=1),
        on_trace_ready=lambda recorder: recorder.export_chrome_trace(str(path)),
        record_shapes=True,
    ) as recorder:
        for step in steps:
            yield step
            recorder.step()
