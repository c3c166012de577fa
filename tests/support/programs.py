"""Models whose `train.py` a test writes, and jobs over them."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.support import galleries
from tests.support.publishing import publish
from tests.support.ray_fixture import Running
from tunesmith.api.views import JobView
from tunesmith.jobs.spec import TrainSpec

PARAMETERS = {
    "training_methods": [
        {"name": "full", "hyperparameters": [{"name": "epochs", "type": "int", "required": True, "default": 3}]}
    ]
}
TRAIN = """
import json, os, pathlib, signal, socket, subprocess, sys, time
env = os.environ
params = json.loads(env["ENV_AG_USER_PARAMS"])
output = pathlib.Path(env["ENV_AG_TRAIN_OUTPUT_DIR"])
metrics = pathlib.Path(env["ENV_AG_USER_METRICS_LOG_PATH"])
"""
"""The beginning of every `train.py`."""

_numbers = count(1)


def publish_points(running: Running, folder: Path) -> str:
    """Publish a dataset of one row; its `NAME@VERSION`."""
    (folder / "rows.csv").write_text("x,y\n1,2\n")
    return publish(running, "dataset", "points", folder)


@dataclass
class Start:
    """Publishes a model with this end of its `train.py`, and orders a job."""

    running: Running
    folder: Path
    dataset: str

    def __call__(
        self,
        train: str,
        *,
        card: str = "",
        files: dict[str, str] | None = None,
        complete: Callable[[Path], None] = lambda folder: None,
        **order: Any,
    ) -> JobView:
        name = f"program-{next(_numbers)}"
        source = TRAIN + textwrap.dedent(train)
        folder = galleries.make(self.folder / name, source, parameters=PARAMETERS, card=card, **(files or {}))
        complete(folder)
        model = publish(self.running, "model", name, folder)
        given = {"model": model, "dataset": self.dataset, "flavor": "cpu-small", "output_model": f"{name}-new", **order}
        return self.running.client.submit(TrainSpec(**given))
