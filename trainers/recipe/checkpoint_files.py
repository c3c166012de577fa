"""Checkpoints: what the folder of one holds, and how it is written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainers.recipe.strategy import Snapshot
from tunesmith.errors import ModelError

MOMENTS = "optimizer.safetensors"


class CheckpointWriter:
    """Writes everything needed to go on: the adapter in peft's format, the optimizer's moments, and the state.

    What `save_adapter` works out again each time, which is most of the work of writing one, is worked out once.
    """

    def __init__(self, model: Any) -> None:
        from peft import get_peft_model_state_dict

        config = model.peft_config["default"]
        self._config = replace(config, inference_mode=True)
        own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        numbers = {name: torch.tensor(number) for number, name in enumerate(own)}
        there = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
        self._names = {own[int(number)]: name for name, number in there.items()}

    def write(self, folder: Path, snapshot: Snapshot, state: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        adapter = folder / "adapter"
        self._config.save_pretrained(adapter)
        weights = {self._names[name]: tensor.contiguous() for name, tensor in snapshot.weights.items()}
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file({name: tensor.contiguous() for name, tensor in snapshot.moments.items()}, folder / MOMENTS)
        (folder / "state.json").write_text(json.dumps(dict(state)))


def load_moments(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The moments of a checkpoint, and its state. `load_adapter` reads the adapter, which lies in `adapter/`."""
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return load_file(folder / MOMENTS), state


def save_adapter(folder: Path, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the model's adapter in peft's format; `weights` are given by their names in the model."""
    model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)


def load_adapter(folder: Path, model: Any) -> None:
    """Load the weights of an adapter in peft's format. Raises ModelError where they do not fit this model's adapter."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    unlike = sorted(
        name
        for name in {*own, *weights}
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if unlike:
        raise ModelError(
            f"the earlier adapter is not one for these modules: {len(unlike)} matrices differ, first {unlike[0]}",
            fields=["hyperparameters.finetuned_model", "advanced.target_modules"],
            hint="target_modules must be what it was tuned with",
        )
    set_peft_model_state_dict(model, weights)
