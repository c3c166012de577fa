"""Fits y = a x + b. Run by Tunesmith as `python train.py`, in the folder of this file."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

MODEL = Path(os.environ["ENV_AG_MODEL_DIR"])  # all files of the model; read only
DATASET = Path(os.environ["ENV_AG_DATASET_DIR"])  # all files of the dataset; read only
PARAMS = json.loads(os.environ["ENV_AG_USER_PARAMS"])  # the chosen hyperparameters
OUTPUT = Path(os.environ["ENV_AG_TRAIN_OUTPUT_DIR"])  # what is here at the end becomes the new model's files
METRICS = Path(os.environ["ENV_AG_USER_METRICS_LOG_PATH"])  # lines of iteration|loss|throughput
RESTORED = os.environ["ENV_AG_OUTPUT_RESTORED"] == "1"  # whether OUTPUT holds what an earlier attempt left


def main() -> int:
    # A stop comes as SIGTERM: save what there is, and end.
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    points = [row for path in sorted(DATASET.rglob("*.csv")) for row in csv.DictReader(path.open(encoding="utf-8"))]
    if not points:
        sys.exit(f"there are no rows in *.csv below {DATASET}")
    x = torch.tensor([float(row["x"]) for row in points])
    y = torch.tensor([float(row["y"]) for row in points])
    line = torch.zeros(2, requires_grad=True)
    first = 1
    checkpoint = OUTPUT / "checkpoint.json"
    if RESTORED and checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        line.data = torch.tensor(saved["line"])
        first = saved["epoch"] + 1
    if "note" in PARAMS:
        print(PARAMS["note"], flush=True)
    for epoch in range(first, PARAMS["max_epochs"] + 1):
        began = time.monotonic()
        loss = ((line[0] * x + line[1] - y) ** 2).mean()
        loss.backward()
        assert line.grad is not None
        line.data -= PARAMS["lr"] * line.grad
        line.grad = None
        throughput = len(points) / (time.monotonic() - began)
        with METRICS.open("a") as metrics:
            metrics.write(f"{epoch}|{loss.item():.6f}|{throughput:.1f}\n")
        print(f"epoch {epoch} LOSS {loss.item():.6f}", flush=True)
        # Written beside and moved: a file in OUTPUT is whole at any time.
        partial = OUTPUT / "checkpoint.json.partial"
        partial.write_text(json.dumps({"epoch": epoch, "line": line.tolist()}))
        partial.replace(checkpoint)
        if stops:
            return 0
    torch.save(line.detach(), OUTPUT / "line.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
