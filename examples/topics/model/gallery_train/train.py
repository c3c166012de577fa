"""Makes a classifier of a pretrained sentence encoder: `full` trains it whole, `head` its last layer alone."""

import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all files are there, and there is no network

import torch
from transformers import AutoModel, AutoTokenizer

MODEL, DATASET = Path(os.environ["ENV_AG_MODEL_DIR"]), Path(os.environ["ENV_AG_DATASET_DIR"])
OUTPUT, METRICS = Path(os.environ["ENV_AG_TRAIN_OUTPUT_DIR"]), Path(os.environ["ENV_AG_USER_METRICS_LOG_PATH"])
PARAMS = {"lr": 0.0, "batch_size": 16, **json.loads(os.environ["ENV_AG_USER_PARAMS"])}


class Classifier(torch.nn.Module):
    def __init__(self, labels: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MODEL, use_safetensors=True)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of shape [texts, labels], from the mean over each text's tokens."""
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


def read(name: str) -> list[dict[str, str]]:
    with (DATASET / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    torch.manual_seed(0)
    train, test = read("train.jsonl"), read("test.jsonl")
    labels = sorted({row["label"] for row in train})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = Classifier(len(labels))
    groups = [{"params": model.head.parameters(), "lr": 0.01}]
    if PARAMS["lr"]:
        groups.append({"params": model.encoder.parameters(), "lr": PARAMS["lr"]})
    optimizer = torch.optim.AdamW(groups)

    def logits(rows: list[dict[str, str]]) -> torch.Tensor:
        texts = [row["text"] for row in rows]
        return model(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    def answers(rows: list[dict[str, str]]) -> torch.Tensor:
        return torch.tensor([labels.index(row["label"]) for row in rows])

    @torch.no_grad()
    def accuracy() -> float:
        return (logits(test).argmax(1) == answers(test)).float().mean().item()

    before, step = accuracy(), 0
    for _ in range(PARAMS["epochs"]):
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(train), PARAMS["batch_size"]):
            began = time.monotonic()
            rows = [train[number] for number in order[start : start + PARAMS["batch_size"]]]
            loss = torch.nn.functional.cross_entropy(logits(rows), answers(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            with METRICS.open("a") as file:
                file.write(f"{step}|{loss.item():.6f}|{len(rows) / (time.monotonic() - began):.1f}\n")
            print(f"step {step} LOSS {loss.item():.4f}")
    model.encoder.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)
    torch.save({"labels": labels, "head": model.head.state_dict()}, OUTPUT / "head.pt")
    report = {"accuracy_before": before, "accuracy": accuracy()}
    (OUTPUT / "accuracy.json").write_text(json.dumps(report))
    print(report)


if __name__ == "__main__":
    main()
