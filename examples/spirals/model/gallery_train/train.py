"""Trains a small network on points in a plane; several workers share the rows and add their gradients up."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

DATASET, OUTPUT = Path(os.environ["ENV_AG_DATASET_DIR"]), Path(os.environ["ENV_AG_TRAIN_OUTPUT_DIR"])
METRICS = Path(os.environ["ENV_AG_USER_METRICS_LOG_PATH"])
PARAMS = json.loads(os.environ["ENV_AG_USER_PARAMS"])
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CHECKPOINT = OUTPUT / "checkpoint.pt"


def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of shape [rows, 2] and their labels."""
    with (DATASET / name).open(encoding="utf-8") as file:
        rows = [(float(row["x"]), float(row["y"]), int(row["label"])) for row in csv.DictReader(file)]
    return torch.tensor([row[:2] for row in rows]), torch.tensor([row[2] for row in rows])


def save(path: Path, content: object) -> None:
    """Whole or not at all: what is in OUTPUT is kept while the training goes on."""
    partial = path.with_suffix(".new")
    torch.save(content, partial)
    partial.replace(path)


def main() -> None:
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(PARAMS["seed"])
    width = PARAMS["width"]
    model = torch.nn.Sequential(
        torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(),
        torch.nn.Linear(width, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=PARAMS["lr"])
    first = 1
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"] + 1
    points, labels = read("train.csv")
    mine, mine_labels = points[RANK::WORLD], labels[RANK::WORLD]
    for epoch in range(first, PARAMS["max_epochs"] + 1):
        began = time.monotonic()
        # The sum over this worker's rows, as a part of the mean over all.
        loss = torch.nn.functional.cross_entropy(model(mine), mine_labels, reduction="sum") / len(points)
        optimizer.zero_grad()
        loss.backward()
        stop, total = torch.tensor(float(bool(stops))), loss.detach().clone()
        if WORLD > 1:
            for tensor in (stop, total, *(p.grad for p in model.parameters())):
                dist.all_reduce(tensor)
        optimizer.step()
        if RANK == 0:
            throughput = len(points) / (time.monotonic() - began) / WORLD
            with METRICS.open("a") as file:
                file.write(f"{epoch}|{total.item():.6f}|{throughput:.1f}\n")
            if stop or epoch % 50 == 0:
                save(CHECKPOINT, {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
                print(f"epoch {epoch} LOSS {total.item():.4f}")
        if stop:
            return
    if RANK == 0:
        points, labels = read("test.csv")
        accuracy = (model(points).argmax(1) == labels).float().mean().item()
        save(OUTPUT / "model.pt", model.state_dict())
        (OUTPUT / "accuracy.json").write_text(json.dumps({"accuracy": accuracy}))
        CHECKPOINT.unlink(missing_ok=True)
        print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
