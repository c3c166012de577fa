"""The model that is trained: a frozen base and peft's LoRA adapter, whose layers compute in one operation each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from trainers.recipe.device import Device
from trainers.recipe.kernels.matmul import add_widened, narrow_down, product, sum_and_narrow_down, sum_over_tokens
from trainers.recipe.quantization import QuantizedLinear, load_quantized, unpacked
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters


def load_model(folder: Path, h: LoraHyperparameters, advanced: Advanced, device: Device) -> Any:
    """The frozen base with a fresh adapter, the same on every worker for the same seed: a peft model, on the CPU.

    ModelError where the target modules are not there, the base cannot be quantized to `bits`, or a file of it names one
    outside of the folder.
    """
    from transformers import AutoModelForCausalLM

    check_references(folder)
    half = advanced.precision == "bf16" or (advanced.precision == "auto" and device.has_bf16)
    dtype = torch.bfloat16 if half else torch.float32
    if h.bits is not None:
        base = load_quantized(folder, h.bits, dtype, device)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return with_adapter(base, h, advanced)


def with_adapter(base: Any, h: LoraHyperparameters, advanced: Advanced) -> Any:
    """The base, frozen, with a fresh adapter; as `load_model`."""
    from peft import LoraConfig, get_peft_model

    targets = advanced.target_modules
    config = LoraConfig(
        r=h.lora_rank,
        lora_alpha=h.lora_alpha,
        lora_dropout=h.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(advanced.seed)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(
            f"target_modules {targets!r} fit no module of the model: {error}", fields=["advanced.target_modules"]
        ) from error
    if advanced.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model


class LoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's LoRA layer; where nothing but the plain case is asked for, forward and backward are one operation each.

    The plain case: one adapter, at work, not merged, without dropout.
    """

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        name = None if args or options or self.disable_adapters or self.merged else self._plain()
        if name is None:
            made: torch.Tensor = super().forward(x, *args, **options)
            return made
        base = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        scales = base.scales if isinstance(base, QuantizedLinear) else None
        made, _ = _lora_linear(x, base.weight, scales, base.bias, a, b, self.scaling[name])
        return made

    def _plain(self) -> str | None:
        if len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        dropout = self.lora_dropout[name]
        return name if isinstance(dropout, nn.Identity) or not self.training else None


@torch.library.custom_op("tunesmith::lora_linear", mutates_args=())
def _lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [*, in], weight [out, in], a [rank, in], b [out, rank]: x·weightᵀ + bias + scale·x·aᵀ·bᵀ, and x·aᵀ.

    With `scales` the weight is packed (trainers.recipe.quantization).
    """
    flat = x.reshape(-1, x.shape[-1])
    low = narrow_down(flat, a.to(x.dtype))
    made = product(flat, unpacked(weight, scales, (b.shape[0], a.shape[1]), x.dtype), bias)
    add_widened(made, low, b.to(x.dtype).t(), scale)
    return made.view(*x.shape[:-1], -1), low


@torch.library.custom_op("tunesmith::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    low: torch.Tensor,
    scale: float,
    wants_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (empty where it is not wanted), a and b; the frozen weight has none."""
    flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_b, grad_low = sum_and_narrow_down(low, grad, b.to(x.dtype).t())
    if wants_x:
        grad_x = product(grad, unpacked(weight, scales, (b.shape[0], a.shape[1]), x.dtype).t())
        add_widened(grad_x, grad_low, a.to(x.dtype), scale)
        grad_x = grad_x.view(x.shape)
    else:
        grad_x = x.new_empty(0)
    grad_a = sum_over_tokens(grad_low, flat).to(a.dtype).mul_(scale)
    return grad_x, grad_a, grad_b.to(b.dtype).mul_(scale).t().contiguous()


@_lora_linear.register_fake
def _(
    x: torch.Tensor, weight: Any, scales: Any, bias: Any, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@_lora_linear_backward.register_fake
def _(
    grad: Any,
    x: torch.Tensor,
    weight: Any,
    scales: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    low: Any,
    scale: float,
    wants_x: bool,
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape if wants_x else (0,)), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, scales, _, a, b, ctx.scale = inputs
    ctx.save_for_backward(x, weight, scales, a, b, output[1])


def _backward(context: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    wants_x = context.needs_input_grad[0]
    grad_x, grad_a, grad_b = _lora_linear_backward(grad, *context.saved_tensors, context.scale, wants_x)
    return grad_x if wants_x else None, None, None, None, grad_a, grad_b, None


_lora_linear.register_autograd(_backward, setup_context=_keep)
