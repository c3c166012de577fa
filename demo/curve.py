"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tunesmith.jobs.attempts import MetricLine


def draw(metrics: Iterable[MetricLine], file: Path, *, title: str) -> None:
    """Write a PNG with the training loss by step and the held-out loss before and after."""
    from matplotlib.figure import Figure

    # Of steps done again after a restart, the last time counts.
    series: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
    for line in metrics:
        if line.name in series:
            series[line.name][line.step] = line.value
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_points(series["loss"]), label="training", linewidth=1.5)
    axes.plot(*_points(series["eval_loss"]), "o--", label="held out", markersize=7)
    axes.set(xlabel="step", ylabel="loss, nats per response token", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _points(values: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]
