"""Models that bring their own training, as folders."""

import json
from pathlib import Path
from typing import Any

PARAMETERS: dict[str, Any] = {
    "training_methods": [
        {
            "name": "full",
            "hyperparameters": [
                {"name": "lr", "type": "float", "required": True, "default": 0.001, "help": "learning rate"},
                {"name": "max_epochs", "type": "int", "required": False, "default": 10, "help": "epochs"},
                {"name": "note", "type": "str", "required": False},
                {"name": "labels", "type": "str", "required": True, "help": "column with the labels"},
            ],
        },
        {"name": "head", "hyperparameters": [{"name": "frozen", "type": "bool", "required": True, "default": True}]},
    ]
}

SAVES_AT_SIGTERM = """
def save(number, frame):
    (output / "saved.txt").write_text("in time")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("waiting", flush=True)
time.sleep(1000)
"""
"""The end of a `train.py` that has `output`, and waits to be stopped."""


def make(
    folder: Path,
    train: str = "print('LOSS 1.0')\n",
    *,
    task_type: str = "tabular",
    parameters: Any = None,
    card: str = "",
    **files: str,
) -> Path:
    """Write a model to `folder`; `card`: more lines of its front matter, `files`: more of `gallery_train/`."""
    gallery = folder / "gallery_train"
    gallery.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\ntask_type: {task_type}\nlicense: mit\n{card}---\n# a model\n")
    (folder / "weights.bin").write_bytes(b"\0\1\2")
    (gallery / "train.py").write_text(train)
    (gallery / "train_params.json").write_text(json.dumps(parameters or PARAMETERS, indent=1))
    (gallery / "dataset_readme.md").write_text("# rows\n\nOne file, `行.csv`.\n", encoding="utf-8")
    for name, text in files.items():
        (gallery / name.replace("_txt", ".txt")).write_text(text)
    return folder
