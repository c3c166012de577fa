"""Models in GGUF files, made into folders that stock transformers loads.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

MAGIC = b"GGUF"

_UNREADABLE = (ValueError, KeyError, IndexError, OSError, RuntimeError, MemoryError, struct.error)
"""What the readers raise for an unknown architecture or quantization, and for a file cut short."""


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` to `folder`: config, generation config, tokenizer, float32 safetensors.

    The folder loads with no `gguf` package. Raises ModelError where the file is no model that transformers can read.
    """
    _check(gguf_file)
    model, tokenizer = _load(gguf_file)
    plain = _without_quantization(model, gguf_file)
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise ModelError(f"there is no file {gguf_file}", fields=["source"])
    with gguf_file.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                f"{gguf_file.name} is no GGUF file: it does not begin with {MAGIC.decode()}", fields=["source"]
            )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{gguf_file.name} needs the package gguf, which is not installed here",
            fields=["source"],
            hint="pip install 'tunesmith[demo]'",
            code="package_missing",
        )


def _load(gguf_file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **place)
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **place)
    except _UNREADABLE as error:
        raise ModelError(
            f"{gguf_file.name} could not be read as a causal language model: {error}",
            fields=["source"],
            hint="the file may be cut short, or of an architecture that transformers does not read from GGUF",
        ) from error
    return model, tokenizer


def _without_quantization(model: Any, gguf_file: Path) -> Any:
    """The same weights in a model of their own: transformers refuses to save one that came out of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        plain.load_state_dict(model.state_dict())
    except RuntimeError as error:  # layers that transformers keeps packed have other names and shapes
        raise ModelError(
            f"the weights of {gguf_file.name} do not fit its own architecture {config.model_type}: {error}",
            fields=["source"],
        ) from error
    plain.generation_config = model.generation_config
    return plain
