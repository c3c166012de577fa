"""What an attempt publishes: the files and the manifest of a new version."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.jobs.spec import TrainJob
from tunesmith.storage import layout


def write_user_parameters(folder: Path, job: TrainJob, root: str) -> None:
    """Write `training_logs/user_params.json`: every parameter the job ran with; `root` is the storage's URL."""
    name, _, version = job.dataset.partition("@")
    places = {
        "data_url": layout.join(root, layout.asset("dataset", name, int(version))),
        "train_url": layout.join(root, layout.asset(*job.output)),
    }
    given = job.model_dump(include={"hyperparameters", "advanced"})
    parameters = {"method": job.method, **given["advanced"], **given["hyperparameters"]}
    parameters |= {key: url for key, url in places.items() if parameters.get(key) is None}
    file = folder / "training_logs" / "user_params.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(parameters, indent=2, ensure_ascii=False), encoding="utf-8")
