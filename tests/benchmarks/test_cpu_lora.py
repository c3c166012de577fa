"""The benchmark on the CPU: contestants are given the same rows, and the arithmetic counted is that of the model."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cpu_lora
from benchmarks.contest import Run, batch_plan
from benchmarks.peers.flops import required_flops
from tests.support import tiny
from trainers.recipe.collate import Pass
from trainers.recipe.device import pick_device
from trainers.recipe.kernels import cross_entropy
from trainers.recipe.lora import LoraLinear, load_model
from trainers.recipe.loss import loss_sum
from trainers.text.shards import TokenizedRows


def options(**given: object) -> argparse.Namespace:
    usual = {
        "warmup_steps": 1,
        "steps": 1,
        "batch_rows": 2,
        "passes": 2,
        "max_length": 64,
        "advanced": [],
        "profile": None,
        "threads": 1,
    }
    return argparse.Namespace(**{**usual, **given})


def test_the_flops_of_a_step_are_those_of_the_models_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter sees into torch's own operations alone.
    monkeypatch.setattr(LoraLinear, "_plain", lambda self: None)
    monkeypatch.setattr(cross_entropy, "product", torch.nn.functional.linear)
    advanced = tiny.advanced(precision="fp32")
    model = load_model(tiny.make_model(tmp_path), tiny.hyperparameters(), advanced, pick_device())
    model.get_base_model().set_attn_implementation("eager")
    length = 24
    ids = torch.randint(4, 200, (1, length))
    places = torch.arange(9, length - 1)
    row = Pass(ids, torch.arange(length)[None], None, length, places, ids[0, places + 1])
    with FlopCounterMode(display=False) as counter:
        loss_sum(model, row).backward()  # type: ignore[no-untyped-call]
    config = model.get_base_model().config
    needed = required_flops(config, lora_rank=4, spans=[(0, length)], trained_tokens=14)
    # Eager attention makes the whole square of each of its six products.
    above = 12 * (length**2 - length * (length + 1) // 2) * config.hidden_size * config.num_hidden_layers
    assert counter.get_total_flops() == needed + above


def test_peers_are_given_the_rows_of_the_recipes_steps(tmp_path: Path) -> None:
    rows = tiny.tokens(12)
    work = cpu_lora.prepare(rows, tmp_path, tmp_path, options())
    given = [json.loads(line) for line in Path(work.rows).read_text().splitlines()]
    plan = batch_plan(rows, work)
    assert len(given) == len(rows)
    for step in range(1, plan.steps_per_epoch + 1):
        mine = sorted((rows.ids(row).tolist(), rows.trained(row).tolist()) for row in plan.rows(step))
        theirs = given[(step - 1) * work.global_rows : step * work.global_rows]
        masks = [[label != -100 for label in row["labels"]] for row in theirs]
        assert mine == sorted((row["input_ids"], mask) for row, mask in zip(theirs, masks, strict=True))
        pairs = [pair for row in theirs for pair in zip(row["input_ids"], row["labels"], strict=True)]
        assert all(label in (-100, id_) for id_, label in pairs)
    read = TokenizedRows.open([Path(work.shard)], rows.report)
    assert all((read.ids(row) == rows.ids(row)).all() for row in range(len(rows)))


def test_only_what_ran_in_every_round_has_figures() -> None:
    run = Run([{"loss": 2.0, "tokens": 10, "seconds": 1.0, "cpu_seconds": 1.0}] * 2, 1, 2**30, {})
    slow = Run([{"loss": 2.2, "tokens": 10, "seconds": 2.0, "cpu_seconds": 2.0}] * 2, 1, 2**31, {})
    rounds = [{"ours": run, "hf_plain": slow, "trl_packed": run}, {"ours": run, "hf_plain": slow}]
    figures = cpu_lora.take_figures(rounds, 50, [100.0, 100.0], {"trl_packed"})
    assert figures["ratio_vs_hf_trainer"]["value"] == 2.0
    assert figures["memory_ratio_vs_hf_trainer"]["value"] == 0.5
    assert figures["matmul_peak_share"]["value"] == 0.5
    assert figures["max_relative_loss_difference"]["value"] == pytest.approx(0.2 / 2.2)
    assert not {"ratio_vs_trl", "ratio_vs_best_peer", "ratio_vs_llamafactory"} & set(figures)


@pytest.mark.soak
def test_ours_and_the_plain_trainer_have_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    model = tiny.make_model(tmp_path / "model")
    work = cpu_lora.prepare(tiny.tokens(16), model, tmp_path, options())
    lines: list[str] = []
    ours = cpu_lora.run_contestant("ours", work, options(), lines)
    plain = cpu_lora.run_contestant("hf_plain", work, options(), lines)
    assert ours is not None and plain is not None, lines
    assert [step["tokens"] for step in ours.steps] == [step["tokens"] for step in plain.steps]
    assert ours.losses == pytest.approx(plain.losses, rel=1e-4)
