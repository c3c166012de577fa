"""Jobs of the text recipe that cannot go well, on a platform that really runs: they fail once, and say what to do."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import jobs, tiny
from tests.support.publishing import publish
from tests.support.ray_fixture import Running
from tunesmith.api.views import JobView

pytestmark = pytest.mark.ray


def publish_both(running: Running, name: str, model: Path, rows: Iterable[dict[str, str]]) -> None:
    (model / "README.md").write_text(jobs.CARD)
    data = model.with_name("data")
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    publish(running, "model", name, model)
    publish(running, "dataset", name, data)


def failed_once(running: Running, job_id: str) -> JobView:
    ended = running.client.wait(job_id)
    assert (ended.state, ended.attempt) == ("failed", 1), (ended, jobs.log(running, job_id, "driver"))
    assert not [event for event in jobs.events(running, job_id) if "restart" in event.data]
    assert running.client.models(name=ended.output.split("@")[0]).items == []
    return ended


def test_a_worker_that_takes_more_than_its_flavor_has_fails_the_job_with_what_takes_less(
    platform: Running, tmp_path: Path
) -> None:
    # One activation of the pass, of 65,536 tokens, takes 4 GiB, which is all that cpu-small has.
    rows = [{"prompt": "x" * 30, "response": "y" * 30}] * 1024
    publish_both(platform, "vast", tiny.make_model(tmp_path / "model", mlp_width=1 << 14), rows)
    given = {"test_data_file": None, "per_device_train_batch_size": 1024, "max_steps": 1}
    order = jobs.spec(
        model="vast", dataset="vast", output_model="none", hyperparameters=given, advanced={"packing": "off"}
    )
    job = platform.client.submit(order)
    ended = failed_once(platform, job.id)
    assert ended.reason == "out_of_memory"
    assert "memory ran out in a pass of 65536 tokens on cpu" in (ended.message or "")
    assert "per_device_train_batch_size=512 takes half" in (ended.message or "")


def test_a_loss_that_is_no_number_fails_the_job_with_the_rows_and_the_last_good_checkpoint(
    platform: Running, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tiny.make_model(tmp_path / "whole"), tiny.make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.encode("Z")] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tiny.sums(16)
    rows[5] = {"prompt": "Z", "response": "a"}
    publish_both(platform, "holed", tmp_path / "model", rows)
    given = {"test_data_file": None, "per_device_train_batch_size": 1, "max_steps": 16, "save_steps": 1}
    job = platform.client.submit(jobs.spec(model="holed", dataset="holed", output_model="none", hyperparameters=given))
    ended = failed_once(platform, job.id)
    assert ended.reason == "user_error"
    saved = jobs.checkpoint_steps(platform, job.id)[-1]
    message = f"the loss or gradient of step {saved + 1} is not a number; its rows, as the audit counts them: 5; "
    assert message + f"the last good checkpoint is that of step {saved}" in (ended.message or "")
