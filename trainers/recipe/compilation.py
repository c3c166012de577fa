"""Compiling a model's layers where it pays: torch.compile makes one kernel of many small operations."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.hyperparameters.definitions import Advanced

PAYS_FROM_S = 600.0
"""Compiling takes half a minute and saves a tenth: training of this length wins by it."""

logger = logging.getLogger(__name__)


def why_not_compiled(model: Any, advanced: Advanced, device: torch.device, tokens: int) -> str | None:
    """Why a run of `tokens` tokens should not be compiled; None where it should."""
    base = model.get_base_model()
    if not _layers(base):
        return "its layers are not known"
    if advanced.gradient_checkpointing:
        return "it checkpoints activations"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "there is no C++ compiler"
    if device.type == "cuda" and find_spec("triton") is None:
        return "there is no triton"
    # Rough operations a second of the device; an unknown one is not compiled for.
    speed = {"cpu": 1.2e11 * torch.get_num_threads(), "cuda": 2e14}.get(device.type)
    if speed is None:
        return f"it is not tried on {device.type}"
    seconds = 4 * base.num_parameters() * tokens / speed
    return (
        None
        if seconds >= PAYS_FROM_S
        else f"the run is short (about {seconds:.0f} s, it pays from {PAYS_FROM_S:.0f} s)"
    )


def compile_layers(model: Any, attempt: Callable[[], object]) -> bool:
    """Compile each layer of the model, all to the same code, for any number of tokens. Returns whether that went well.

    `attempt` makes one forward and backward pass. Where it fails, the layers stay as they were.
    """
    base = model.get_base_model()
    for layer in _layers(base):
        layer.compile(dynamic=True)
    base.enable_input_require_grads()  # otherwise the first layer is another code
    try:
        attempt()
    except (RuntimeError, OSError, subprocess.SubprocessError):
        # What a backend raises, torch hands on as a RuntimeError of its own; the others are of the compiler's process.
        logger.warning("the layers could not be compiled, they run as they are", exc_info=True)
        for layer in _layers(base):
            layer._compiled_call_impl = None
        return False
    return True


def _layers(base: Any) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
