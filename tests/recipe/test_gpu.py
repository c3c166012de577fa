"""What only a GPU can show of the recipe: its attention, its compiled layers, and a host that never waits.

`make gpu`; or, where there are only torch, transformers, peft, accelerate, bitsandbytes, pyarrow, pydantic, jinja2 and
pytest, `python -m pytest --noconftest -m gpu tests/test_gpu.py`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from trainers.recipe.device import pick_device
from trainers.recipe.kernels.attention import why_not_packed
from trainers.recipe.lora import load_model
from trainers.recipe.quantization import QuantizedLinear, unpacked
from trainers.recipe.training_loop import Hooks, Outcome, train
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import tokenize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
ROUNDING = 5e-3
"""Relative: two ways to the same loss in bf16, of which each number has 8 bits."""
STEPS = 8


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def run(model_folder: Path, *, hooks: dict[str, Any] | None = None, **options: Any) -> tuple[list[float], Outcome]:
    """A training in bf16; the losses it reports."""
    losses: list[float] = []
    usual = {
        "report": lambda step, values: losses.append(values["loss"]),
        "save": lambda step, folder: None,
        "should_stop": lambda: False,
    }
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    outcome = train(
        model_folder,
        rows(8 * STEPS),
        None,
        hyperparameters=tiny.hyperparameters(**given, **options.pop("hyperparameters", {})),
        advanced=tiny.advanced(precision="bf16", **options.pop("advanced", {})),
        hooks=Hooks(**{**usual, **(hooks or {})}),
        compiled=options.pop("compiled", False),
    )
    return losses, outcome


def rows(count: int) -> TokenizedRows:
    return tokenize_rows(
        tiny.sums(count),
        tiny.make_tokenizer(),
        hyperparameters=tiny.hyperparameters(),
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )


def test_a_model_in_bf16_may_be_packed(model_folder: Path) -> None:
    device = pick_device()
    model = load_model(model_folder, tiny.hyperparameters(), tiny.advanced(precision="bf16"), device)
    model.to(device.torch_device)
    assert why_not_packed(model, 64) is None


def test_packed_rows_have_the_losses_of_padded_ones(model_folder: Path) -> None:
    packed, _ = run(model_folder)
    padded, _ = run(model_folder, advanced={"packing": "off"})
    assert packed == pytest.approx(padded, rel=ROUNDING)


def test_compiled_layers_have_the_losses_of_others(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = run(model_folder)
    compiled, _ = run(model_folder, compiled=True)
    assert "could not be compiled" not in caplog.text
    assert compiled == pytest.approx(plain, rel=ROUNDING)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_trains_in_bf16_packed_padded_and_compiled_alike(
    model_folder: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"hyperparameters": {"bits": bits}}
    full, _ = run(model_folder)
    packed, outcome = run(model_folder, **given)
    padded, _ = run(model_folder, **given, advanced={"packing": "off"})
    compiled, _ = run(model_folder, **given, compiled=True)
    assert "could not be compiled" not in caplog.text
    assert packed == pytest.approx(padded, rel=ROUNDING)
    assert compiled == pytest.approx(packed, rel=ROUNDING)
    assert packed[0] == pytest.approx(full[0], rel={4: 0.15, 8: 0.02}[bits])
    frozen = {p.dtype for p in outcome.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, torch.float32, {4: torch.uint8, 8: torch.int8}[bits]}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight_is_unpacked_on_the_gpu_as_on_the_cpu(model_folder: Path, bits: int) -> None:
    given = tiny.hyperparameters(bits=bits), tiny.advanced(precision="fp32")
    device = pick_device()
    layers = [
        [module for module in load_model(model_folder, *given, place).modules() if isinstance(module, QuantizedLinear)]
        for place in (device, replace(device, torch_device=torch.device("cpu")))
    ]
    for ours, theirs in zip(*layers, strict=True):
        shape = (ours.out_features, ours.in_features)
        weights = [unpacked(layer.weight, layer.scales, shape, torch.float32).cpu() for layer in (ours, theirs)]
        # A few lie at the border of two values.
        assert float((weights[0] - weights[1]).abs().gt(1e-5).float().mean()) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_never_waits_for_the_gpu_in_a_step_without_a_report(model_folder: Path, compiled: bool) -> None:
    asked = 0

    def should_stop() -> bool:
        """Called in each step before gradients are clipped: from the second step's call to the last one's."""
        nonlocal asked
        asked += 1
        if asked == 2:
            torch.cuda.set_sync_debug_mode("error")
        if asked == STEPS:
            torch.cuda.set_sync_debug_mode("default")
        return False

    try:
        losses, outcome = run(
            model_folder,
            hooks={"should_stop": should_stop},
            hyperparameters={"logging_steps": 100, "save_steps": 100},
            compiled=compiled,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (asked, outcome.steps, len(losses)) == (STEPS, STEPS, 1)


def test_a_training_that_was_saved_has_the_optimizers_state_on_the_gpu(model_folder: Path, tmp_path: Path) -> None:
    whole, _ = run(model_folder, hyperparameters={"save_steps": 4}, hooks={"save": _keep(tmp_path)})
    rest: list[float] = []
    train(
        model_folder,
        rows(8 * STEPS),
        None,
        hyperparameters=tiny.hyperparameters(
            max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2
        ),
        advanced=tiny.advanced(precision="bf16"),
        hooks=Hooks(
            report=lambda step, values: rest.append(values["loss"]),
            save=lambda step, folder: None,
            should_stop=lambda: False,
        ),
        resume_from=tmp_path / "4",
        compiled=False,
    )
    assert rest == pytest.approx(whole[4:], rel=ROUNDING)


def _keep(out: Path) -> Any:
    return lambda step, folder: folder and folder.rename(out / str(step)) and None
