"""What a training run leaves: the new model's files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainers.attempt.publication import write_user_parameters
from trainers.recipe.checkpoint_files import load_adapter, save_adapter
from trainers.recipe.device import pick_device
from trainers.recipe.lora import load_model
from trainers.recipe.strategy import shares_base
from tunesmith.errors import ModelError
from tunesmith.jobs.spec import TextJob

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of merged and unmerged logits, beside the size of the logits."""

logger = logging.getLogger(__name__)


def write_products(
    model: Any, weights: Mapping[str, torch.Tensor], base_folder: Path, folder: Path, job: TextJob, root: str
) -> None:
    """Write the new model's files (docs/contracts.md, section 5) to `folder`; `root` is the storage's URL.

    `model` is the tuned peft model, whose adapter's `weights` are given by their names in it; merging takes it apart,
    or, where its base is quantized or in pieces, a model of the base in full precision. ModelError where merged and
    unmerged logits differ.
    """
    model.peft_config["default"].base_model_name_or_path = job.model
    save_adapter(folder / "adapter", model, weights)
    if job.advanced.merge_adapter:
        whole = model if _is_whole(model, job) else in_full(base_folder, folder / "adapter", job)
        merge(whole).save_pretrained(folder)
        for path in base_folder.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    elif (base_folder / "README.md").exists():
        shutil.copyfile(base_folder / "README.md", folder / "README.md")
    write_user_parameters(folder, job, root)


def _is_whole(model: Any, job: TextJob) -> bool:
    """Whether the model's weights are all there, as its files have them."""
    return job.hyperparameters.bits is None and not shares_base(model)


def in_full(base_folder: Path, adapter: Path, job: TextJob) -> Any:
    """The base in full precision with the adapter, on the CPU: the accelerator may have no room for it."""
    device = pick_device()
    h = job.hyperparameters.model_copy(update={"bits": None})
    model = load_model(base_folder, h, job.advanced, replace(device, torch_device=torch.device("cpu")))
    load_adapter(adapter, model)
    return model


@torch.no_grad()
def merge(model: Any) -> Any:
    """The base with the adapter added to its weights; ModelError where its logits are not those of base and adapter."""
    model.eval()
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=random).to(device)
    unmerged = model(input_ids=ids, use_cache=False).logits
    merged = model.merge_and_unload(safe_merge=True)
    logits = merged(input_ids=ids, use_cache=False).logits
    difference = float((logits - unmerged).abs().max())
    allowed = _TOLERANCE[merged.dtype] * max(1.0, float(unmerged.abs().max()))
    logger.info("merged logits differ by %.2g from unmerged ones (allowed %.2g)", difference, allowed)
    if not difference <= allowed:
        raise ModelError(
            f"merged and unmerged logits differ by {difference:.3g}, more than {allowed:.3g}; nothing was published",
            hint="advanced.merge_adapter=false publishes the adapter alone",
            code="merge_failed",
        )
    return merged
