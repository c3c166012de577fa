"""A frozen base of 4 or 8 bits a weight (Dettmers et al., "QLoRA", 2023): packed when loaded, unpacked to multiply.

bitsandbytes packs: 4 bits are its NormalFloat with a scale for each 64 weights, 8 bits whole numbers with a scale for
each row. Its own layers are not used: they round activations too, by what else is in the batch (8 bits), and on some
processors compute in bf16 once the model no longer trains (4 bits). Here a weight is unpacked whole, into the model's
dtype, for the product and again for its gradient, and what is unpacked is not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trainers.recipe.device import Device
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError

BLOCK = 64
"""Weights that share a scale, of 4 bits each."""


def load_quantized(folder: Path, bits: int, dtype: torch.dtype, device: Device) -> Any:
    """The base model on the device, its linear layers quantized; embeddings and head keep their precision.

    Each weight is packed when it is read, so the model is never in memory in full precision. Raises ModelError for
    a model without layers to quantize, or one whose files are quantized already.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    check_references(folder)
    if getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "quantization_config", None):
        raise ModelError(
            f"bits={bits} quantizes a model in full precision, and this one is quantized already",
            fields=["hyperparameters.bits"],
        )
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=BitsAndBytesConfig(**kind),
        device_map={"": device.torch_device},
    )
    packed = {name: module for name, module in base.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}
    if not packed:
        raise ModelError(f"bits={bits}: the model has no linear layers to quantize", fields=["hyperparameters.bits"])
    for name, module in packed.items():
        base.set_submodule(name, _own_layer(module))
    # What stayed in full may be a view into the file, which would stay mapped whole.
    for module in base.modules():
        if not isinstance(module, QuantizedLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    base.hf_quantizer.remove_quantization_config(base)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False  # peft and transformers would look for their layers
    return base


def _own_layer(layer: Any) -> QuantizedLinear:
    weight = layer.weight
    scales = weight.SCB[:, None] / 127 if weight.dtype == torch.int8 else weight.quant_state.absmax
    return QuantizedLinear(weight.data, scales, layer.bias, out_features=layer.out_features)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed, and unpacked whenever it multiplies.

    uint8, two of nf4 to a byte, with scales [blocks]; or int8 [out, in] with scales [out, 1].
    """

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, *, out_features: int
    ) -> None:
        nn.Module.__init__(self)
        numbers = weight.numel() * (1 if weight.dtype == torch.int8 else 2)
        self.in_features, self.out_features = numbers // out_features, out_features
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.scales = nn.Parameter(scales.detach(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _quantized_linear(x, self.weight, self.scales, self.bias, self.out_features)
        return made


def unpacked(
    weight: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight of a layer, of this `shape` [out, in]; as it is where it has no scales."""
    if scales is None:
        return weight
    if weight.dtype == torch.int8:
        return weight.to(dtype).mul_(scales)
    # As one line of weights: bitsandbytes 0.50 takes wrong scales on a CPU where blocks reach over the ends of rows.
    line = [shape[0] * shape[1]]
    flat: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(weight, scales, BLOCK, "nf4", line, dtype)
    return flat.view(shape)


# Operations of their own, so that torch.compile sees no unpacked weight that it might keep for the gradient.
@torch.library.custom_op("tunesmith::quantized_linear", mutates_args=())
def _quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    return F.linear(x, unpacked(weight, scales, (out_features, x.shape[-1]), x.dtype), bias)


@torch.library.custom_op("tunesmith::quantized_linear_backward", mutates_args=())
def _quantized_linear_backward(
    grad: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, in_features: int
) -> torch.Tensor:
    return grad @ unpacked(weight, scales, (grad.shape[-1], in_features), grad.dtype)


@_quantized_linear.register_fake
def _(x: torch.Tensor, weight: Any, scales: Any, bias: Any, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@_quantized_linear_backward.register_fake
def _(grad: torch.Tensor, weight: Any, scales: Any, in_features: int) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, scales, *_ = inputs
    ctx.save_for_backward(weight, scales)
    ctx.in_features = x.shape[-1]


def _backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _quantized_linear_backward(grad, *context.saved_tensors, context.in_features), None, None, None, None


_quantized_linear.register_autograd(_backward, setup_context=_keep)
