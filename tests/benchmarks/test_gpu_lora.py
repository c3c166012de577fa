"""The benchmark on a GPU, as far as it goes without one: its model, its rows, who can run, its figures."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import contest, gpu_lora
from benchmarks.contest import Run
from benchmarks.peers import random_model
from benchmarks.peers.random_model import random_llama


def options(**given: Any) -> argparse.Namespace:
    usual = {
        "tiny": True,
        "full": False,
        "max_length": None,
        "batch_rows": None,
        "passes": 2,
        "warmup_steps": 1,
        "steps": 2,
        "checkpointed": False,
        "uncompiled": False,
        "profile": None,
    }
    return argparse.Namespace(**{**usual, **given})


def run(speed: float, loss: float, **given: Any) -> Run:
    step = {"loss": loss, "tokens": speed, "seconds": 1.0, "cpu_seconds": 1.0}
    return Run([step, step], 1, 2**30, {}, given.get("memory", 2**34))


def test_the_random_model_is_written_shard_by_shard_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "SHARD_BYTES", 1 << 16)
    folder = random_llama(tmp_path / "model", **gpu_lora.TINY)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(model.config.initializer_range, rel=0.05)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.config.eos_token_id == 0


def test_rows_are_the_same_every_time_unequal_and_trained_behind_their_prompts() -> None:
    rows, again = (gpu_lora.made_up_rows(options(), 512) for _ in range(2))
    assert len(rows) == 8 * 2 * 3
    assert len(set(rows.lengths.tolist())) > 10 and rows.lengths.max() <= 128
    for row in range(len(rows)):
        assert (rows.ids(row) == again.ids(row)).all() and 0 < rows.ids(row).min() <= rows.ids(row).max() < 512
        trained = rows.trained(row).tolist()
        assert trained == sorted(trained) and trained[-1] and not trained[0]
    full = gpu_lora.made_up_rows(options(full=True), 512)
    assert set(full.lengths.tolist()) == {128} and len(full) == 2 * 2 * 3


def test_who_cannot_run_is_left_out_with_a_reason() -> None:
    lines: list[str] = []
    assert gpu_lora.able(["ours", "unsloth_packed"], lines, cuda=False) == ["ours"]
    assert len(lines) == 1 and lines[0].startswith("unsloth_packed is left out: ")
    with pytest.raises(SystemExit, match="no contestant left"):
        gpu_lora.able(["trl_wide"], lines, cuda=False)


def test_the_figures_are_those_of_the_best_setting_of_each_peer() -> None:
    rounds = [
        {
            "ours": run(30, 2.0),
            "trl_wide": run(20, 3.0),
            "trl_padding_free": run(15, 2.1),
            "unsloth_plain": run(10, 2.0),
        }
    ] * 2
    figures = gpu_lora.take_figures(rounds, 50, [100.0, 100.0], {"unsloth_plain"})
    values = {name: value["value"] for name, value in figures.items()}
    assert (values["ratio_vs_trl"], values["tokens_per_s"], values["model_flops_utilisation"]) == (1.5, 30, 0.5)
    assert values["max_relative_loss_difference"] == pytest.approx(0.1 / 2.1)
    assert values["ours_peak_memory_gib"] == 16
    assert "ratio_vs_unsloth" not in values


def test_who_runs_out_of_memory_goes_on_with_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[bool] = []

    def contestant(name: str, contestant: Any, work: Any, *, lines: list[str], **options: Any) -> Run | None:
        tried.append(work.checkpointed)
        if work.checkpointed:
            return run(1, 1.0)
        lines.append("trl_wide FAILED:\ntorch.OutOfMemoryError: CUDA out of memory")
        return None

    monkeypatch.setattr(gpu_lora, "run_contestant", contestant)
    rows = gpu_lora.made_up_rows(options(), 512)
    runner = gpu_lora.Runner(gpu_lora.work_of(options(), rows, tmp_path, tmp_path, cuda=True), 1, [])
    assert runner.run("trl_wide") is not None and runner.run("trl_wide") is not None
    assert tried == [False, True, True]


@pytest.mark.soak
def test_ours_and_trl_have_the_same_losses_on_the_same_steps(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = gpu_lora.made_up_rows(options(), 512)
    model = random_llama(tmp_path / "model", **gpu_lora.TINY)
    trace = tmp_path / "trace.json"
    work = gpu_lora.work_of(options(profile=trace), rows, model, tmp_path, cuda=False)
    contest.write_work(rows, work)
    lines: list[str] = []
    runner = gpu_lora.Runner(work, 1, lines)
    ours, theirs = runner.run("ours"), runner.run("trl_stock")
    assert ours is not None and theirs is not None, lines
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert [step["tokens"] for step in ours.steps] == [step["tokens"] for step in theirs.steps]
    assert trace.exists()
