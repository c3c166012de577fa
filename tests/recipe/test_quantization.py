"""A base of 4 or 8 bits: really smaller, near the full one, trained over by the same recipe, and merged in full."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import tiny
from tests.support.stage import Stage
from trainers.recipe.collate import pack
from trainers.recipe.device import pick_device
from trainers.recipe.lora import LoraLinear, load_model
from trainers.recipe.loss import loss_sum
from trainers.recipe.quantization import QuantizedLinear, unpacked
from trainers.recipe.strategy import trained_parameters
from trainers.recipe.training_loop import Hooks, Outcome, train
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import tokenize_rows
from trainers.text_job import products
from tunesmith.errors import ModelError, SpecError
from tunesmith.jobs.spec import TextJob

BITS = (4, 8)
NEAR = {4: 0.15, 8: 0.01}
"""Relative: how far the first loss may be from that of the full base."""
STEPS = 8
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that the scales of 64 weights do not reach over rows, where bitsandbytes' own layers go wrong."""
    return tiny.make_model(tmp_path_factory.mktemp("model"), width=64, head_width=16)


@pytest.fixture(scope="module")
def rows() -> TokenizedRows:
    return tokenize_rows(
        tiny.sums(32),
        tiny.make_tokenizer(),
        hyperparameters=tiny.hyperparameters(),
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )


def run(
    model_folder: Path,
    rows: TokenizedRows,
    bits: int | None,
    *,
    out: Path | None = None,
    compiled: bool = False,
    advanced: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[int, float], Outcome]:
    """One run of the recipe; its losses by step. Checkpoints are kept as `out/STEP`."""
    losses: dict[int, float] = {}
    folders = {name: options.pop(name, None) for name in ("start_from", "resume_from", "eval_rows")}
    outcome = train(
        model_folder,
        rows,
        folders["eval_rows"],
        hyperparameters=tiny.hyperparameters(bits=bits, **options),
        advanced=tiny.advanced(**(advanced or {})),
        hooks=Hooks(
            report=lambda step, values: losses.update({step: values["loss"]} if "loss" in values else {}),
            save=lambda step, folder: out and folder and folder.rename(out / str(step)) and None,
            should_stop=lambda: False,
        ),
        start_from=folders["start_from"],
        resume_from=folders["resume_from"],
        compiled=compiled,
    )
    return losses, outcome


def load(model_folder: Path, bits: int | None, **advanced: Any) -> Any:
    return load_model(model_folder, tiny.hyperparameters(bits=bits), tiny.advanced(**advanced), pick_device())


def tuned(model_folder: Path, bits: int | None) -> Any:
    """The base with an adapter that changes its answers, the same one whatever the bits."""
    model = load(model_folder, bits).eval()
    return tiny.at_work(model)


def make_job(bits: int | None, **advanced: Any) -> TextJob:
    return tiny.train_job(tiny.hyperparameters(bits=bits), tiny.advanced(**advanced))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def quantized(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# The base


def write(model: Any, base: Path, folder: Path, job: TextJob) -> None:
    products.write_products(model, trained_parameters(model), base, folder, job, "/s")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [32, 64])
def test_each_linear_layer_is_near_its_full_self_and_has_the_bits(tmp_path: Path, width: int, bits: int) -> None:
    folder = tiny.make_model(tmp_path, width=width)
    full = load(folder, None).get_base_model()
    base = load(folder, bits).get_base_model()
    layers = quantized(base)
    assert len(layers) == 2 * 7  # layers of the model, linear ones of each
    for name, layer in layers.items():
        weight = full.get_submodule(name).weight
        shape = (layer.out_features, layer.in_features)
        assert tuple(weight.shape) == shape
        error = torch.linalg.vector_norm(unpacked(layer.weight, layer.scales, shape, weight.dtype) - weight)
        share = float(error / torch.linalg.vector_norm(weight))
        assert {4: 0.05, 8: 0.002}[bits] < share < {4: 0.11, 8: 0.01}[bits]
        size = sum(p.numel() * p.element_size() for p in (layer.weight, layer.scales))
        overhead = weight.numel() / 16 if bits == 4 else 4 * layer.out_features  # a scale for 64 weights, or for a row
        assert size == pytest.approx(weight.numel() * bits / 8 + overhead, abs=4)
    assert all(not p.requires_grad for layer in layers.values() for p in layer.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_head_embeddings_and_norms_stay_in_full(model_folder: Path, bits: int) -> None:
    full, base = (load(model_folder, bits_).get_base_model() for bits_ in (None, bits))
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert type(base.get_output_embeddings()) is nn.Linear
    own = dict(base.named_parameters())
    for name, parameter in full.named_parameters():
        if "embed" in name or "norm" in name:
            assert torch.equal(own[name], parameter)


def test_a_model_that_is_quantized_already_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized already") as caught:
        load(folder, 4)
    assert caught.value.fields == ["hyperparameters.bits"]


# Training over it


@pytest.mark.parametrize("bits", BITS)
def test_the_loss_begins_near_that_of_the_full_base_and_falls(
    model_folder: Path, rows: TokenizedRows, bits: int
) -> None:
    full, _ = run(model_folder, rows, None, max_steps=1)
    losses, outcome = run(model_folder, rows, bits, advanced={"num_train_epochs": 6}, eval_rows=rows)
    assert losses[1] == pytest.approx(full[1], rel=NEAR[bits])
    assert losses[1] != pytest.approx(full[1], rel=1e-5)
    assert outcome.eval_loss is not None
    assert outcome.eval_loss_before is not None
    assert outcome.eval_loss < 0.8 * outcome.eval_loss_before


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_that_of_the_unpacked_weights(model_folder: Path, rows: TokenizedRows, bits: int) -> None:
    """The same base in full precision, its weights replaced by what the packed ones stand for: equal to rounding."""
    model, same = tuned(model_folder, bits), tuned(model_folder, None)
    plain = dict(same.named_modules())
    for module in plain.values():
        if isinstance(module, LoraLinear):
            module._plain = lambda: None  # type: ignore[method-assign]  # then the layer is peft's
    for name, layer in quantized(model).items():
        shape = (layer.out_features, layer.in_features)
        plain[name].weight.data = unpacked(layer.weight, layer.scales, shape, torch.float32)
    some = pack(rows, [0, 1, 2, 3], torch.device("cpu"))
    gradients = []
    for each in (model, same):
        (loss_sum(each, some) / len(some.targets)).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_splits_padding_compiled_and_checkpointed_layers_change_nothing(
    model_folder: Path, rows: TokenizedRows, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, _ = run(model_folder, rows, bits, per_device_train_batch_size=8)
    others = {
        "split": run(model_folder, rows, bits, **split),
        "padded": run(model_folder, rows, bits, per_device_train_batch_size=8, advanced={"packing": "off"}),
        "checkpointed": run(
            model_folder, rows, bits, per_device_train_batch_size=8, advanced={"gradient_checkpointing": True}
        ),
        "compiled": run(model_folder, rows, bits, per_device_train_batch_size=8, compiled=True),
    }
    assert "could not be compiled" not in caplog.text
    for name, (losses, _) in others.items():
        assert losses == pytest.approx(one, abs=2e-5), name


@pytest.mark.parametrize("bits", BITS)
def test_with_dropout_and_where_a_layer_has_no_adapter_the_base_is_the_same(
    model_folder: Path, rows: TokenizedRows, bits: int
) -> None:
    """Layers then multiply by themselves; dropout of next to nothing leaves the losses."""
    for advanced in ({}, {"target_modules": "q_proj,down_proj"}):
        plain, _ = run(model_folder, rows, bits, advanced=advanced, max_steps=3)
        other, _ = run(model_folder, rows, bits, advanced=advanced, max_steps=3, lora_dropout=1e-7)
        assert other == pytest.approx(plain, abs=2e-5)
    model = tuned(model_folder, bits)
    with model.disable_adapter():
        alone = logits(model)
    torch.testing.assert_close(alone, logits(load(model_folder, bits).eval()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(
    model_folder: Path, rows: TokenizedRows, tmp_path: Path, bits: int
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "rest").mkdir()
    whole, _ = run(model_folder, rows, bits, out=tmp_path / "whole", save_steps=3)
    rest, _ = run(model_folder, rows, bits, out=tmp_path / "rest", save_steps=3, resume_from=tmp_path / "whole" / "3")
    assert sorted(rest) == [4, 5, 6, 7, 8]
    assert rest == {step: whole[step] for step in rest}
    last = [load_file(tmp_path / f"{name}/8/adapter/adapter_model.safetensors") for name in ("whole", "rest")]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


def test_an_earlier_adapter_goes_on_over_a_base_of_other_bits(
    model_folder: Path, rows: TokenizedRows, tmp_path: Path
) -> None:
    first, _ = run(model_folder, rows, None, out=tmp_path)
    for bits in BITS:
        losses, _ = run(model_folder, rows, bits, start_from=tmp_path / "8" / "adapter", max_steps=1)
        assert losses[1] < 0.95 * first[1]


# What it leaves


@pytest.mark.parametrize("bits", BITS)
def test_the_merged_model_is_the_full_base_and_the_adapter(model_folder: Path, tmp_path: Path, bits: int) -> None:
    from transformers import AutoModelForCausalLM

    write(tuned(model_folder, bits), model_folder, tmp_path / "quantized", make_job(bits))
    write(tuned(model_folder, None), model_folder, tmp_path / "full", make_job(None))
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "full"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    base = load_file(model_folder / "model.safetensors")
    adapter = load_file(tmp_path / "quantized" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 16 / 4 * b @ a, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((tmp_path / "full" / "config.json").read_text())
    assert not quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"))
    parameters = json.loads((tmp_path / "quantized" / "training_logs" / "user_params.json").read_text())
    assert parameters["bits"] == bits


def test_a_merge_that_leaves_the_scale_out_is_not_published(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, name: right(layer, name) / layer.scaling[name])
    with pytest.raises(ModelError) as caught:
        write(tuned(model_folder, 4), model_folder, tmp_path / "new", make_job(4))
    assert caught.value.code == "merge_failed"


@pytest.mark.parametrize("bits", BITS)
def test_the_adapter_loads_in_stock_peft_on_the_full_and_on_the_quantized_base(
    model_folder: Path, tmp_path: Path, bits: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tuned(model_folder, bits)
    ours = logits(model)
    write(model, model_folder, tmp_path / "new", make_job(bits, merge_adapter=False))
    full = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(full, tmp_path / "new" / "adapter").eval()
    torch.testing.assert_close(logits(adapted), logits(tuned(model_folder, None)), atol=1e-4, rtol=0)
    kind = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=kind)
    # Not for inference: bitsandbytes then computes 4 bits in bf16 on some processors.
    stock = PeftModel.from_pretrained(packed, tmp_path / "new" / "adapter").train()
    difference = torch.linalg.vector_norm(logits(stock) - ours) / torch.linalg.vector_norm(ours)
    assert float(difference) < {4: 1e-4, 8: 0.03}[bits]  # with 8 bits its layers round activations as well


def test_answers_are_made_over_a_quantized_base(model_folder: Path) -> None:
    from trainers.recipe.evaluation import generate_answers

    tokenizer = tiny.make_tokenizer()
    for bits in BITS:
        answers = generate_answers(tuned(model_folder, bits), tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=8)
        assert len(answers) == 2
        assert any(answers)


# At the order


def test_a_flavor_that_cannot_quantize_is_refused_at_the_order(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for bits in BITS:
        given = {"hyperparameters": {"bits": bits}}
        for flavor in ("cpu-small", "gpu-1"):
            job = stage.draft(**given, flavor=flavor)
            assert isinstance(job, TextJob)
            assert job.hyperparameters.bits == bits
        with pytest.raises(SpecError) as caught:
            stage.draft(**given, flavor="npu-1")
        assert caught.value.message.startswith(f"bits={bits} cannot run on flavor 'npu-1'")
        assert caught.value.fields == ["hyperparameters.bits", "flavor"]
        assert "cpu-small" in str(caught.value.hint)
    assert stage.draft(flavor="npu-1").hyperparameters.bits is None  # type: ignore[union-attr]
