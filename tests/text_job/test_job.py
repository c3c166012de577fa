"""A whole job, from the order to the new model, on a platform that really runs."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.support import jobs, tiny
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running
from tests.support.recipe_alone import assert_close, train_alone
from trainers.recipe.evaluation import score
from tunesmith.api.views import JobView
from tunesmith.clock import seconds
from tunesmith.errors import SpecError
from tunesmith.jobs.spec import TrainSpec
from tunesmith.storage import layout

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ready(platform: Running, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """The platform, with the tiny model and dataset registered."""
    jobs.publish_sources(platform, tmp_path_factory.mktemp("sources"))
    return platform


@pytest.fixture(scope="module")
def ordered(ready: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobView]:
    """Jobs that need nothing of each other, in the order in which they are waited for; two run at once."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 7}\n')
    publish(ready, "dataset", "numbers", folder)
    endless = {"hyperparameters": {"max_steps": 20000, "save_steps": 1000}, "advanced": {"num_train_epochs": 10000}}
    specs = {
        "new": jobs.spec(hyperparameters={"max_steps": 150, "save_steps": 50}, advanced={"num_train_epochs": 10}),
        "quantized": jobs.spec(output_model="tuned-4", hyperparameters={"max_steps": 4, "bits": 4}),
        "time limit": jobs.spec(output_model="never", max_run_time_s=60, **endless),
        "bad rows": jobs.spec(dataset="numbers", hyperparameters={"test_data_file": None}),
    }
    return {name: ready.client.submit(spec) for name, spec in specs.items()}


def completed(running: Running, job: JobView) -> str:
    """The id of the job, which has ended well."""
    ended = running.client.wait(job.id)
    assert ended.state == "completed", (ended, jobs.log(running, job.id, "driver"))
    return job.id


def run(running: Running, spec: TrainSpec) -> str:
    return completed(running, running.client.submit(spec))


def losses(running: Running, job_id: str) -> dict[int, float]:
    return {line.step: line.value for line in jobs.metrics(running, job_id, "loss")}


def prometheus(running: Running) -> str:
    """What Ray offers to Prometheus just now, over all its targets."""
    discovery = Path(running.started.temp_dir) / "prom_metrics_service_discovery.json"
    targets = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]
    return "".join(httpx.get(f"http://{target}/metrics", trust_env=False).text for target in targets)


def test_an_order_becomes_a_new_model(ready: Running, ordered: dict[str, JobView]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported: dict[str, list[str]] = {}
    job = ordered["new"]
    for _ in ready.client.follow_events(job.id):
        for name in ("loss", "throughput"):
            exported.setdefault(name, []).extend(
                re.findall(rf'^ray_tunesmith_{name}{{.*job_id="{job.id}".*}} (\S+)$', prometheus(ready), re.MULTILINE)
            )
    ended = ready.client.job(job.id)
    assert ended.state == "completed", jobs.log(ready, job.id, "driver")

    told = jobs.events(ready, job.id)
    assert [event.state for event in told if event.state] == ["pending", "queued", "preparing", "running", "completed"]
    phases = [event.phase for event in told if event.phase]
    assert phases[:4] == ["fetch", "tokenize", "audit", "evaluate"]
    assert phases[4:] == ["train", "evaluate", "train", "evaluate", "train", "evaluate", "save", "publish"]
    summary = told[-1].data
    assert summary["eval_loss"] < 0.8 * summary["eval_loss_before"]

    by_step = losses(ready, job.id)
    assert sorted(by_step) == list(range(1, 151))
    assert {line.name for line in jobs.metrics(ready, job.id)} >= {
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_s_per_card",
        "throughput",
        "memory_rss_bytes",
    }
    for name, values in exported.items():
        own = {line.value for line in jobs.metrics(ready, job.id, name)}
        assert values, f"{name} never reached Prometheus"
        assert {float(value) for value in values} <= own
    assert "LOSS" in jobs.log(ready, job.id, "0")

    evaluations = ready.client.evaluations(job.id).items
    assert [made.step for made in evaluations] == [0, 50, 100, 150]
    before, after = evaluations[0], evaluations[-1]
    assert (before.rows, before.loss, after.loss) == (40, summary["eval_loss_before"], summary["eval_loss"])
    for made in evaluations:
        assert made.scores == score([row.answer for row in made.answers], [row.expected for row in made.answers])
    assert (after.answers[0].prompt, after.answers[0].expected) == tuple(tiny.sums(300)[260].values())
    assert after.answers != before.answers
    assert [line.value for line in jobs.metrics(ready, job.id, "eval_rouge1")] == [
        made.scores["rouge1"] for made in evaluations
    ]
    audit = ready.client.audit(job.id)
    assert (audit.counts.rows, audit.off, audit.findings) == (260, 0, [])

    asset = ready.client.model(ended.output)
    assert (asset.base, asset.dataset, asset.job, asset.task_type) == (
        "tiny@1",
        "tiny@1",
        job.id,
        "text-question-answering",
    )
    # What it was merged into is a model like any other.
    assert asset.training is not None and "text-question-answering" in asset.training.allowed
    folder = jobs.model_files(ready, job.id)
    base = ready.storage.local_path(files_key(ready.storage, "tiny@1"))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        untuned = plain(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(plain, folder / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert not torch.allclose(untuned, adapted, atol=1e-1)
    parameters = json.loads((folder / "training_logs" / "user_params.json").read_text())
    assert (parameters["max_steps"], parameters["lora_rank"], parameters["num_train_epochs"]) == (150, 8, 10)


@pytest.mark.soak
def test_a_job_goes_on_from_an_earlier_result(ready: Running) -> None:
    first = run(ready, jobs.spec(output_model="earlier", hyperparameters={"max_steps": 30, "lora_rank": 4}))
    path = layout.join(ready.storage.url, layout.asset("model", "earlier", 1))
    # Its rank is the earlier one's where none is given.
    order = jobs.spec(output_model="second", hyperparameters={"max_steps": 30, "finetuned_model": path})
    second = run(ready, order)
    resolved = json.loads(ready.storage.get(layout.job_json(second)))["hyperparameters"]
    assert (resolved["finetuned_model"], resolved["lora_rank"]) == ("earlier@1", 4)
    before, *_ = ready.client.evaluations(second).items
    *_, after = ready.client.evaluations(first).items
    assert (before.step, after.step) == (0, 30)
    assert before.loss == pytest.approx(after.loss, abs=1e-4)
    assert ready.client.evaluations(second).items[-1].loss < before.loss


def test_a_job_over_a_quantized_base_publishes_the_full_base_with_its_adapter(
    ready: Running, ordered: dict[str, JobView]
) -> None:
    from transformers import AutoModelForCausalLM

    job_id = completed(ready, ordered["quantized"])
    by_step = losses(ready, job_id)
    full = losses(ready, completed(ready, ordered["new"]))
    assert sorted(by_step) == [1, 2, 3, 4]
    assert by_step[1] == pytest.approx(full[1], rel=0.15)
    assert by_step[1] != pytest.approx(full[1], rel=1e-5)
    assert [made.step for made in ready.client.evaluations(job_id).items] == [0, 4]
    folder = jobs.model_files(ready, job_id)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}


@pytest.mark.soak
def test_two_workers_train_as_one_does(ready: Running) -> None:
    one = run(ready, jobs.spec(hyperparameters={"per_device_train_batch_size": 8}))
    two = run(ready, jobs.spec(cards=2, hyperparameters={"per_device_train_batch_size": 4}))
    assert losses(ready, two) == pytest.approx(losses(ready, one), abs=1e-4)
    assert {line.rank for line in jobs.metrics(ready, two, "memory_rss_bytes")} == {0, 1}
    assert jobs.log(ready, two, "1")


def test_workers_that_share_weights_leave_the_same_model(ready: Running, tmp_path: Path) -> None:
    given = {"max_steps": 6, "save_steps": 3, "lora_rank": 4}
    whole = train_alone(tmp_path, hyperparameters={**given, "per_device_train_batch_size": 8}, advanced={})
    halves = {**given, "per_device_train_batch_size": 4}
    job = run(ready, jobs.spec(cards=2, hyperparameters=halves, advanced={"strategy": "zero3"}))
    assert "strategy zero3, 2 workers" in jobs.log(ready, job, "0")
    assert losses(ready, job) == pytest.approx(whole.losses, abs=1e-4)
    made = load_file(jobs.model_files(ready, job) / "adapter" / "adapter_model.safetensors")
    assert_close(made, load_file(whole.adapter), 3e-4)
    assert [made.step for made in ready.client.evaluations(job).items] == [0, 3, 6]


def test_a_stopped_job_has_saved_a_checkpoint_and_makes_no_model(ready: Running) -> None:
    job = ready.client.submit(
        jobs.spec(
            output_model="never",
            hyperparameters={"max_steps": 5000, "save_steps": 1000, "warmup_ratio": 0.0},
            advanced={"num_train_epochs": 1000},
        )
    )
    jobs.wait_for_event(ready, job.id, lambda event: event.state == "running")
    assert ready.client.stop(job.id).state == "stopping"
    ended = ready.client.wait(job.id)
    assert (ended.state, ended.reason) == ("stopped", "stopped_by_user")
    asked, said = (
        next(event for event in jobs.events(ready, job.id) if event.state == state) for state in ("stopping", "stopped")
    )
    assert seconds(said.time) - seconds(asked.time) < ready.settings.stop_grace_s
    *_, newest = jobs.checkpoint_steps(ready, job.id)
    assert f"with the checkpoint of step {newest}" in str(said.message)
    assert ready.client.models(name="never").items == []

    # It is gone on with by a new job, which begins with what the stopped one had learnt.
    order = jobs.spec(output_model="after", hyperparameters={"max_steps": 2, "finetuned_model": job.id})
    after = run(ready, order)
    untuned = ready.client.evaluations(job.id).items[0].loss
    assert ready.client.evaluations(after).items[0].loss < untuned - 0.1
    ready.client.delete(job.id)


def test_workers_that_make_answers_stop_where_they_are(ready: Running, tmp_path: Path) -> None:
    # Answers to so many rows, as long as these, take far longer than a stop.
    rows = [{"prompt": f"say {number}", "response": "a" * 150} for number in range(6_000)]
    for name, part in (("train.jsonl", rows[:100]), ("held_out.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    publish(ready, "dataset", "answers", tmp_path)
    order = jobs.spec(
        dataset="answers", cards=2, hyperparameters={"max_seq_length": 200, "max_eval_samples": len(rows)}
    )
    job = ready.client.submit(order)
    assert jobs.wait_for_event(ready, job.id, lambda event: event.phase in ("evaluate", "save")).phase == "evaluate"
    while not jobs.metrics(ready, job.id, "eval_loss"):
        time.sleep(0.2)
    ready.client.stop(job.id)
    ended = ready.client.wait(job.id)
    assert (ended.state, ended.reason) == ("stopped", "stopped_by_user")
    assert ready.client.evaluations(job.id).items == []
    assert jobs.checkpoint_steps(ready, job.id) == [1]


def test_a_job_whose_time_is_up_stops_with_a_checkpoint(ready: Running, ordered: dict[str, JobView]) -> None:
    ended = ready.client.wait(ordered["time limit"].id)
    assert (ended.state, ended.reason) == ("stopped", "time_limit")
    assert jobs.checkpoint_steps(ready, ended.id)


def test_rows_that_cannot_be_trained_fail_the_job_with_the_row_and_are_not_tried_again(
    ready: Running, ordered: dict[str, JobView]
) -> None:
    ended = ready.client.wait(ordered["bad rows"].id)
    assert (ended.state, ended.reason, ended.attempt) == ("failed", "data_error", 1)
    assert "rows.jsonl: line 2: column 'response' must hold text" in (ended.message or "")


def test_columns_that_are_not_there_are_refused_at_the_order(ready: Running) -> None:
    before = len(ready.client.jobs().items)
    with pytest.raises(SpecError, match="has no column 'question'; it has prompt, response") as caught:
        ready.client.submit(jobs.spec(hyperparameters={"prompt_field": "question"}))
    assert caught.value.code == "missing_column"
    assert len(ready.client.jobs().items) == before
