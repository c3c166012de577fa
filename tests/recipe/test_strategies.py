"""Every strategy trains as one worker does, is saved in the same form, and goes on from what another one saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tiny, workers
from tests.support.recipe_alone import assert_close
from trainers.recipe import zero
from trainers.recipe.checkpoint_files import MOMENTS
from trainers.recipe.device import pick_device
from trainers.recipe.evaluation import HeldOut, answer
from trainers.recipe.strategy import Worker
from trainers.recipe.training_loop import Hooks, LossError, train

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 3e-4
"""Largest difference of a loss, nats, and of an adapter's number: where a gradient is next to nothing, AdamW divides
one rounding error by another. The learning rate is 1e-2."""
GLOBAL_ROWS = 8
STEPS, SAVED = 6, 3

Trained = tuple[dict[str, dict[str, Any]], Path]


def run(folder: Path, out: Path, strategy: str, worker: Worker = Worker(), **given: Any) -> dict[str, Any]:
    """A short run, and what is seen of it on this worker; checkpoints are left in `out`."""
    losses: dict[str, float] = {}
    answers: dict[str, Any] = {}
    tokenizer = tiny.make_tokenizer()
    held_out = HeldOut(prompts=["a"] * 3, prompt_ids=[[5, 6], [7, 8, 9], [10]], expected=["a"] * 3, max_new_tokens=6)

    def evaluated(step: int, model: Any, loss: float) -> None:
        answers[str(step)] = answer(model, tokenizer, held_out, rank=worker.rank, world_size=worker.world_size)

    outcome = train(
        folder,
        given.pop("rows", None) or tiny.tokens(19),  # the last step of an epoch leaves workers without rows
        tiny.tokens(9),
        hyperparameters=tiny.hyperparameters(
            per_device_train_batch_size=GLOBAL_ROWS // 2 // worker.world_size,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            save_steps=SAVED,
            **given.pop("hyperparameters", {}),
        ),
        advanced=tiny.advanced(num_train_epochs=10, strategy=strategy, **given.pop("advanced", {})),
        hooks=Hooks(
            report=lambda step, values: losses.update({str(step): values["loss"]} if "loss" in values else {}),
            save=lambda step, at: at and at.rename(out / str(step)) and None,
            should_stop=lambda: False,
            evaluated=evaluated,
        ),
        worker=worker,
        **given,
    )
    return {
        "losses": losses,
        "eval_loss": [outcome.eval_loss_before, outcome.eval_loss],
        "weights": {name: weight.tolist() for name, weight in outcome.weights.items()},
        "answers": answers,
        "held": sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in outcome.model.parameters()),
    }


def in_pieces(name: str) -> dict[str, Any]:
    """The strategy's configuration, with parameters in pieces however small they are."""
    config = configuration(name)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


configuration = zero.engine_config


def _worker(rank: int, world_size: int, folder: Path, out: Path, jobs: list[dict[str, Any]]) -> None:
    zero.engine_config = in_pieces
    torch.set_num_threads(1)
    device = pick_device(rank)
    if device.torch_device.type == "cuda":
        torch.cuda.set_device(device.torch_device)
    torch.distributed.init_process_group(device.backend, f"file://{out}/meet", rank=rank, world_size=world_size)
    for job in jobs:
        own = out / str(job.pop("name"))
        own.mkdir(exist_ok=True)
        try:
            seen: Any = run(folder, own, worker=Worker(rank, world_size, rank), **job)
        except LossError as error:
            seen = str(error)
        torch.distributed.barrier()
        if rank == 0:
            (own / "seen.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def run_on(world_size: int, folder: Path, out: Path, *jobs: dict[str, Any]) -> list[Any]:
    """The runs one after the other on so many workers; what worker 0 saw of each."""
    names = [job["name"] for job in jobs]
    workers.run_on(world_size, _worker, world_size, folder, out, list(jobs))
    return [json.loads((out / name / "seen.json").read_text()) for name in names]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), head_width=16)


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one worker without DeepSpeed does, and its checkpoints."""
    out = tmp_path_factory.mktemp("alone")
    return run(model_folder, out, "ddp"), out


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Trained]:
    """What so many workers do under each strategy, by its name, and the folder of their checkpoints."""

    @cache
    def once(world_size: int) -> Trained:
        out = tmp_path_factory.mktemp(f"workers-{world_size}")
        names = [name for name in STRATEGIES if world_size > 1 or name != "ddp"]
        runs = run_on(world_size, model_folder, out, *({"name": name, "strategy": name} for name in names))
        return dict(zip(names, runs, strict=True)), out

    return once


def assert_same(seen: dict[str, Any], right: dict[str, Any], *, first_step: int = 1) -> None:
    expected = {step: loss for step, loss in right["losses"].items() if int(step) >= first_step}
    assert seen["losses"] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert seen["eval_loss"] == pytest.approx(right["eval_loss"], abs=LOSS_TOLERANCE)
    assert seen["weights"].keys() == right["weights"].keys()
    for name, weight in right["weights"].items():
        torch.testing.assert_close(
            torch.tensor(seen["weights"][name]), torch.tensor(weight), atol=WEIGHT_TOLERANCE, rtol=0
        )
    assert seen["answers"] == {
        step: made for step, made in right["answers"].items() if first_step == 1 or int(step) >= first_step
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_under_every_strategy_do_what_one_does(
    model_folder: Path, alone: tuple[dict[str, Any], Path], trained: Callable[[int], Trained], world_size: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    right, checkpoints = alone
    runs, out = trained(world_size)
    for name, seen in runs.items():
        assert_same(seen, right)
        saved = out / name / str(STEPS)
        for file, tolerance in (("adapter/adapter_model.safetensors", WEIGHT_TOLERANCE), (MOMENTS, 1e-5)):
            assert_close(load_file(saved / file), load_file(checkpoints / str(STEPS) / file), tolerance)
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), saved / "adapter")
        tuned = {name: weight for name, weight in stock.named_parameters() if "lora_" in name}
        assert_close(tuned, {name: torch.tensor(weight) for name, weight in seen["weights"].items()}, 0.0)


def test_a_run_goes_on_from_what_another_strategy_saved(
    model_folder: Path, alone: tuple[dict[str, Any], Path], trained: Callable[[int], Trained], tmp_path: Path
) -> None:
    (right, one), (_, two) = alone, trained(2)
    given = [
        {"name": f"{saver}-{name}", "strategy": name, "resume_from": saved / str(SAVED)}
        for name in STRATEGIES
        for saver, saved in (("one", one), ("own", two / name))
    ]
    for seen in run_on(2, model_folder, tmp_path, *given):
        assert_same(seen, right, first_step=SAVED + 1)
    for name in STRATEGIES:
        (tmp_path / f"from-{name}").mkdir()
        seen = run(model_folder, tmp_path / f"from-{name}", "ddp", resume_from=two / name / str(SAVED))
        assert_same(seen, right, first_step=SAVED + 1)


def test_in_bf16_every_strategy_keeps_the_adapter_in_float32(model_folder: Path, tmp_path: Path) -> None:
    advanced = {"precision": "bf16"}
    (tmp_path / "alone").mkdir()
    right = run(model_folder, tmp_path / "alone", "ddp", advanced=advanced)
    jobs = [{"name": name, "strategy": name, "advanced": advanced} for name in STRATEGIES]
    for seen in run_on(2, model_folder, tmp_path, *jobs):
        assert seen["losses"] == pytest.approx(right["losses"], rel=4e-3)  # a number in bf16 has 8 bits
        weights = torch.cat([torch.tensor(weight).flatten() for weight in seen["weights"].values()])
        assert not torch.equal(weights, weights.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_gpus_every_strategy_does_what_one_gpu_does(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    right = run(model_folder, tmp_path / "alone", "ddp")
    jobs = [{"name": name, "strategy": name} for name in STRATEGIES]
    for seen in run_on(min(2, torch.cuda.device_count()), model_folder, tmp_path, *jobs):
        assert seen["losses"] == pytest.approx(right["losses"], rel=4e-3)  # a number in bf16 has 8 bits


def test_a_quantized_base_trains_alike_under_the_strategies_that_leave_it_whole(
    model_folder: Path, tmp_path: Path
) -> None:
    hyperparameters = {"bits": 4}
    (tmp_path / "alone").mkdir()
    right = run(model_folder, tmp_path / "alone", "ddp", hyperparameters=hyperparameters)
    jobs = [{"name": name, "strategy": name, "hyperparameters": hyperparameters} for name in ("ddp", "zero1", "zero2")]
    for seen in run_on(2, model_folder, tmp_path, *jobs):
        assert_same(seen, right)


def test_from_stage_3_on_a_worker_holds_a_piece_of_the_base(trained: Callable[[int], Trained]) -> None:
    whole, *others = [seen["held"] for seen in trained(2)[0].values()]
    assert others[:2] == [whole] * 2
    for pieces in others[2:]:
        assert pieces == pytest.approx(whole / 2, rel=0.01)


def test_a_loss_that_is_no_number_ends_every_strategy_with_its_step(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    first, *others = run_on(
        2, tmp_path / "broken", tmp_path, *({"name": name, "strategy": name} for name in STRATEGIES)
    )
    assert "step 1 is not a number" in first
    assert others == [first] * (len(STRATEGIES) - 1)
