"""The recipe: the same loss however the work is split, the same run however often it is cut, a real adapter."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tiny, workers
from tests.support.recipe_alone import assert_close
from trainers.recipe import training_loop
from trainers.recipe.ddp import Flat
from trainers.recipe.device import pick_device
from trainers.recipe.lora import load_model
from trainers.recipe.loss import loss_sum
from trainers.recipe.strategy import StepsDifferError, Worker
from trainers.recipe.training_loop import Hooks, LossError, Outcome, schedule, train
from tunesmith.errors import ModelError

Losses = dict[int, float]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def run(
    model_folder: Path, out: Path, *, worker: Worker = Worker(), stop_at: int | None = None, **options: Any
) -> tuple[Losses, Outcome]:
    """One run of the recipe; its losses by step. Checkpoints are kept as `out/STEP`."""
    losses: Losses = {}
    seen = 0

    def report(step: int, values: Mapping[str, float]) -> None:
        nonlocal seen
        if "loss" in values:
            losses[step], seen = values["loss"], step

    start_from, resume_from = options.pop("start_from", None), options.pop("resume_from", None)
    rows, eval_rows = options.pop("rows", tiny.tokens(32)), options.pop("eval_rows", None)
    advanced = tiny.advanced(**options.pop("advanced", {}))
    evaluated = options.pop("evaluated", lambda step, model, loss: None)
    outcome = train(
        model_folder,
        rows,
        eval_rows,
        hyperparameters=tiny.hyperparameters(**options),
        advanced=advanced,
        hooks=Hooks(
            report=report,
            save=lambda step, folder: folder and folder.rename(out / str(step)) and None,
            should_stop=lambda: stop_at is not None and seen + 1 >= stop_at,
            evaluated=evaluated,
        ),
        worker=worker,
        start_from=start_from,
        resume_from=resume_from,
    )
    if worker.rank == 0:
        outcome.model.save_pretrained(out / "adapter")
    return losses, outcome


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def _gloo_worker(rank: int, model_folder: Path, out: Path, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{out}/meet", rank=rank, world_size=2)
    losses, outcome = run(
        model_folder, out, worker=Worker(rank, 2, 0), per_device_train_batch_size=4, eval_rows=tiny.tokens(9)
    )
    if rank == 0:
        queue.put((losses, outcome.eval_loss))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_do_what_one_does(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, outcome = run(model_folder, tmp_path / "one", per_device_train_batch_size=8, eval_rows=tiny.tokens(9))
    queue = workers.CONTEXT.SimpleQueue()
    workers.run_on(2, _gloo_worker, model_folder, tmp_path / "two", queue)
    two, eval_loss = queue.get()
    assert two == pytest.approx(one, abs=1e-5)
    assert eval_loss == pytest.approx(outcome.eval_loss, abs=1e-5)
    assert_close(adapter(tmp_path / "one"), adapter(tmp_path / "two"), 1e-4)


def _resumed_worker(rank: int, model_folder: Path, out: Path, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'meet'}", rank=rank, world_size=2)
    try:
        run(
            model_folder,
            out,
            worker=Worker(rank, 2, 0),
            per_device_train_batch_size=2,
            resume_from=out / "saved" / ("3" if rank else "6"),
        )
    except StepsDifferError as error:
        queue.put(str(error))


def test_workers_that_go_on_from_different_checkpoints_do_not_begin(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    run(model_folder, tmp_path / "saved", save_steps=3)
    queue = workers.CONTEXT.SimpleQueue()
    workers.run_on(2, _resumed_worker, model_folder, tmp_path, queue)
    for _ in range(2):
        assert queue.get().endswith("worker 0 from step 6, worker 1 from step 3")


def test_a_global_batch_gives_the_same_run_however_it_is_split(model_folder: Path, tmp_path: Path) -> None:
    results = []
    for rows, passes in ((8, 1), (4, 2), (1, 8)):
        out = tmp_path / f"{rows}"
        out.mkdir()
        results.append(run(model_folder, out, per_device_train_batch_size=rows, gradient_accumulation_steps=passes)[0])
    assert results[1] == pytest.approx(results[0], abs=1e-5)
    assert results[2] == pytest.approx(results[0], abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(model_folder: Path, tmp_path: Path, dropout: float) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = run(model_folder, tmp_path / "whole", save_steps=3, lora_dropout=dropout)
    first, outcome = run(model_folder, tmp_path / "cut", save_steps=3, lora_dropout=dropout, stop_at=4)
    assert (outcome.stopped, outcome.steps, outcome.total_steps) == (True, 4, 8)
    assert sorted(int(p.name) for p in (tmp_path / "cut").iterdir() if p.name.isdecimal()) == [3, 4]
    (tmp_path / "rest").mkdir()
    rest, _ = run(
        model_folder, tmp_path / "rest", save_steps=3, lora_dropout=dropout, resume_from=tmp_path / "cut" / "3"
    )
    assert sorted(rest) == [4, 5, 6, 7, 8]
    assert first | rest == whole
    assert_close(adapter(tmp_path / "whole"), adapter(tmp_path / "rest"), 0.0)


def test_a_run_begins_with_an_earlier_adapter(model_folder: Path, tmp_path: Path) -> None:
    data = {"eval_rows": tiny.tokens(8), "max_steps": 4}
    (tmp_path / "second").mkdir()
    _, first = run(model_folder, tmp_path, **data)
    _, second = run(model_folder, tmp_path / "second", start_from=tmp_path / "adapter", **data)
    assert first.eval_loss_before != pytest.approx(first.eval_loss, abs=1e-3)
    assert second.eval_loss_before == pytest.approx(first.eval_loss, abs=1e-6)


def test_an_adapter_of_other_modules_or_another_rank_is_refused(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path, max_steps=1)
    for other in ({"advanced": {"target_modules": "q_proj,v_proj"}}, {"lora_rank": 8}):
        with pytest.raises(ModelError, match="not one for these modules") as caught:
            run(model_folder, tmp_path, start_from=tmp_path / "adapter", **other)
        assert caught.value.fields[0] == "hyperparameters.finetuned_model"


def test_the_same_seed_gives_the_same_run_and_another_one_another(model_folder: Path, tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        runs.append(run(model_folder, tmp_path / str(number), advanced={"seed": seed})[0])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_loss_falls_and_the_adapter_loads_in_stock_peft(model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    held_out = tiny.tokens(16)
    losses, outcome = run(model_folder, tmp_path, advanced={"num_train_epochs": 10}, eval_rows=held_out)
    assert outcome.eval_loss is not None
    assert outcome.eval_loss_before is not None
    assert outcome.eval_loss < 0.8 * outcome.eval_loss_before
    assert losses[max(losses)] < losses[1]

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter").eval()
    loss, count = 0.0, 0
    for row in range(len(held_out)):
        ids, trained = held_out.ids(row), held_out.trained(row)
        labels = torch.where(torch.from_numpy(trained), torch.from_numpy(ids.copy()).long(), -100)[None]
        inputs = torch.from_numpy(ids.copy()).long()[None]
        with torch.no_grad():
            loss += float(tuned(input_ids=inputs, labels=labels).loss) * int(trained.sum())
        count += int(trained.sum())
    assert loss / count == pytest.approx(outcome.eval_loss, abs=1e-4)
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=inputs).logits, tuned(input_ids=inputs).logits, atol=1e-2)


def test_held_out_rows_are_evaluated_before_at_checkpoints_and_at_the_end_and_change_nothing(
    model_folder: Path, tmp_path: Path
) -> None:
    from trainers.recipe.evaluation import generate_answers

    seen: dict[int, float] = {}
    tokenizer = tiny.make_tokenizer()

    def evaluated(step: int, model: Any, loss: float) -> None:
        generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=4)
        seen[step] = loss

    (tmp_path / "plain").mkdir()
    plain, _ = run(model_folder, tmp_path / "plain", save_steps=3, lora_dropout=0.3)
    (tmp_path / "evaluated").mkdir()
    options = {"save_steps": 3, "lora_dropout": 0.3, "eval_rows": tiny.tokens(16), "evaluated": evaluated}
    losses, outcome = run(model_folder, tmp_path / "evaluated", **options)
    assert losses == plain
    assert list(seen) == [0, 3, 6, 8]
    assert (seen[0], seen[8]) == (outcome.eval_loss_before, outcome.eval_loss)
    (tmp_path / "rest").mkdir()
    seen.clear()
    run(model_folder, tmp_path / "rest", **options, resume_from=tmp_path / "evaluated" / "6")
    assert list(seen) == [8]  # what was evaluated before the cut is not evaluated again


def test_the_adapter_of_a_checkpoint_is_as_peft_would_save_it(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path, save_steps=8)
    saved = tmp_path / "8" / "adapter"  # the other one is saved by peft at the end
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, tmp_path / "adapter")]
    assert configs[0] == configs[1]
    assert_close(load_file(saved / "adapter_model.safetensors"), adapter(tmp_path), 0.0)


def test_who_goes_on_from_a_checkpoint_finds_it_evaluated(model_folder: Path, tmp_path: Path) -> None:
    saved: dict[int, list[str]] = {}

    def evaluated(step: int, model: Any, loss: float) -> None:
        saved[step] = sorted(path.name for path in tmp_path.iterdir())

    run(model_folder, tmp_path, save_steps=3, eval_rows=tiny.tokens(8), evaluated=evaluated)
    assert saved == {0: [], 3: [], 6: ["3"], 8: ["3", "6", "8"]}


def test_an_evaluation_ends_where_the_run_is_to_stop(model_folder: Path, tmp_path: Path) -> None:
    evaluated: list[int] = []
    losses, outcome = run(
        model_folder,
        tmp_path,
        eval_rows=tiny.tokens(16),
        stop_at=1,
        evaluated=lambda step, model, loss: evaluated.append(step),
    )
    assert (evaluated, outcome.eval_loss_before, outcome.eval_loss) == ([], None, None)
    assert (outcome.stopped, list(losses)) == (True, [1])


def test_logits_at_the_trained_places_alone_give_the_models_own_loss(model_folder: Path) -> None:
    from trainers.recipe.collate import pad

    device = pick_device()
    model = load_model(model_folder, tiny.hyperparameters(), tiny.advanced(), device).eval()
    rows = tiny.tokens(5)
    padded = pad(rows, [0, 1, 2, 3, 4], device.torch_device)
    ids = padded.ids
    padding = torch.tensor([[at < rows.lengths[row] for at in range(ids.shape[1])] for row in range(len(rows))])
    labels = torch.full_like(ids, -100)
    labels.view(-1)[padded.places + 1] = padded.targets
    with torch.no_grad():
        ours = loss_sum(model, padded) / len(padded.targets)
        stock = model(input_ids=ids, attention_mask=padding, labels=labels).loss
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def test_max_steps_ends_a_run_early_and_the_datas_end_ends_it_first(model_folder: Path, tmp_path: Path) -> None:
    for number, (max_steps, steps) in enumerate(((3, 3), (1000, 8))):
        (tmp_path / str(number)).mkdir()
        losses, outcome = run(model_folder, tmp_path / str(number), max_steps=max_steps)
        assert (outcome.steps, outcome.stopped, max(losses)) == (steps, False, steps)


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_the_end() -> None:
    linear = [schedule(done, 10, warmup_ratio=0.2, kind="linear") for done in range(11)]
    assert linear == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])
    assert [schedule(done, 4, warmup_ratio=0.0, kind="constant") for done in range(4)] == [1, 1, 1, 1]
    assert schedule(5, 10, warmup_ratio=0.0, kind="cosine") == pytest.approx(0.5)


def test_dropout_has_a_seed_of_its_own_in_every_pass_the_same_on_every_interpreter() -> None:
    seeds = [training_loop.dropout_seed(*place) for place in product(range(3), repeat=4)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[:3] == [2968811710, 3317235285, 1201711368]


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(LossError, match=r"step 1 is not a number.*there is no checkpoint yet"):
        run(tmp_path / "broken", tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_breaks_says_the_step_its_rows_and_the_last_good_checkpoint(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    right, passes = Flat.backward, 0

    def breaks_at_the_seventh(self: Flat, rows: Any, weight: float, *, last: bool) -> None:
        nonlocal passes
        passes += 1
        right(self, rows, weight, last=last)
        if passes == 7 and what == "gradient":
            self.values.grad[0] = float("inf")
        if passes == 7 and what == "loss":
            self.loss *= float("nan")

    monkeypatch.setattr(Flat, "backward", breaks_at_the_seventh)
    with pytest.raises(LossError) as caught:
        # It is not looked at before the tenth step, but for the checkpoint of the eighth.
        run(model_folder, tmp_path, logging_steps=10, save_steps=4, advanced={"num_train_epochs": 4})
    rows = training_loop.BatchPlan(tiny.tokens(32).lengths, batch_rows=4, passes=1, world_size=1, seed=0).rows(7)
    assert "step 7 is not a number" in str(caught.value)
    assert f"counts them: {', '.join(map(str, sorted(rows)))};" in str(caught.value)
    assert "the last good checkpoint is that of step 4" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_modules_that_are_not_there_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        run(model_folder, tmp_path, advanced={"target_modules": "nothing_like_this"})
    assert caught.value.fields == ["advanced.target_modules"]
