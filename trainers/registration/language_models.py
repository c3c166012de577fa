"""Whether a model's files are a causal language model that loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tunesmith.assets.model_folder import LANGUAGE_MODEL_FILES
from tunesmith.errors import ModelError

logger = logging.getLogger(__name__)


def look_for_language_model(folder: Path) -> tuple[dict[str, Any], bool]:
    """What the files in `folder` are, and whether a causal language model at all."""
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights or not all((folder / name).is_file() for name in LANGUAGE_MODEL_FILES):
        return {}, False
    try:
        return check_language_model(folder), True
    except ModelError as error:
        logger.info("the model is no causal language model: %s", error.message)
        return {}, False


def check_language_model(folder: Path) -> dict[str, Any]:
    """Load the model as a job will, and run it once; what it is. ModelError says why it does not."""
    _convert_gguf(folder)
    for name in LANGUAGE_MODEL_FILES:
        if not (folder / name).exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir()))
            raise ModelError(
                f"the model has no {name}; it has {there}",
                fields=["source"],
                hint="a causal language model has config.json, tokenizer.json and *.safetensors, or is one GGUF file; "
                "a model with training of its own has another task type",
            )
    try:
        return _load(folder)
    except ModelError:
        raise
    except Exception as error:
        # Whatever a library says of broken files is the verdict.
        logger.exception("the model does not load")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model does not load: {first}",
            fields=["source"],
            hint="it must load with transformers' AutoModelForCausalLM, from safetensors, without code of its own",
        ) from error


def _load(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise ModelError(
            f"the weights do not fit config.json: missing {missing[:5]}, of another shape {mismatched[:5]}",
            fields=["source"],
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ModelError(f"the tokenizer knows {len(tokenizer)} tokens, the model {vocabulary}", fields=["source"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]) % vocabulary).logits
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not numbers", fields=["source"])
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_seq_length": getattr(model.config, "max_position_embeddings", None),
        "chat_template": tokenizer.chat_template is not None,
    }


def _convert_gguf(folder: Path) -> None:
    """Where the weights are one GGUF file, put safetensors in its place."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return
    if len(files) > 1:
        raise ModelError(f"there are {len(files)} GGUF files, one is allowed: {', '.join(p.name for p in files)}")
    from trainers.registration.gguf_weights import convert

    convert(files[0], folder)
    files[0].unlink()
