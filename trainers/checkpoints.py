"""What a checkpoint's folder holds, written and read by the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Everything needed to go on: the adapter in peft's form, the optimizer's moments, and the state."""
    from safetensors.torch import save_file

    model.save_pretrained(folder / "adapter")
    moments = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(dict(state)))


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's adapter and moments in place; its state."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        number, _, name = key.partition(".")
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state
