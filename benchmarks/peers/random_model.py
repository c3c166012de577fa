"""A Llama of random weights, written once: shape and size are what a measurement of speed needs of a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHARD_BYTES = 2 << 30


def random_llama(folder: Path, **shape: Any) -> Path:
    """The model's folder, made if it is not there: bf16 safetensors, config, and a tokenizer of a few words.

    `shape` are settings of LlamaConfig. No more than a shard is in memory at a time.
    """
    from transformers import LlamaConfig

    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, dtype="bfloat16")
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "model"
        config.save_pretrained(made)
        _save_weights(made, config)
        _save_tokenizer(made)
        made.rename(folder)
    return folder


def _save_weights(folder: Path, config: Any) -> None:
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(0)
    shapes = _shapes(config)
    files: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        tensors = {}
        for name in names:
            weight = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if weight.dim() > 1:  # else it is a norm's
                weight.normal_(std=config.initializer_range, generator=random)
            tensors[name] = weight.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(config: Any) -> dict[str, torch.Size]:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _save_tokenizer(folder: Path) -> None:
    """Rows are tokens already; trainers only want to know how they end and are padded."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<|end|>": 0, "a": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
