"""A run that is killed at any point goes on as if it had not been: the same losses, rows and adapter.

The recipe, the uploads and a storage, without Ray: each attempt is a process of its own that ends itself by SIGKILL.
That Ray's workers and drivers go on likewise is in test_kills. Rows are of unequal content, so the losses tell their
order: `test_rows_in_another_order_show_in_the_losses`.
"""

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import tiny, workers
from tests.support.recipe_alone import assert_close
from tests.support.waiting import until
from trainers.recipe.batches import BatchPlan
from trainers.recipe.training_loop import Hooks, Outcome, train
from trainers.text_job.checkpoint_manifests import CheckpointManifests
from trainers.text_job.checkpoint_uploads import Uploads
from trainers.text_job.stored_checkpoints import checkpoint_copy
from tunesmith.jobs.attempts import EventWriter, checkpoints
from tunesmith.storage.folder import FolderStorage

ROWS, EPOCHS, STEPS_PER_EPOCH, SAVE_STEPS = 32, 4, 4, 3
STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Kill:
    """Where a process ends itself, and the newest checkpoint that the next one goes on from."""

    step: int
    found: int
    before: str | None = None
    """None: it ends after the report of the step. Else: before this file of the step's checkpoint is stored."""
    found_by_driver: int | None = None
    """Where it is another one for a driver that lives: it makes a checkpoint count whose files are all stored."""


KILLS = (
    Kill(1, 0),
    Kill(5, 3),
    Kill(8, 6),  # the last step of an epoch
    Kill(12, 9, before="optimizer.safetensors"),
    Kill(15, 12, before="stored.json"),
    Kill(15, 12, before="manifest.json", found_by_driver=15),
)


class Deadly(FolderStorage):
    """A folder whose writer is killed before it stores a file with this end of its key."""

    def __init__(self, root: Path, ending: str) -> None:
        super().__init__(root)
        self._ending = ending

    def upload_file(self, path: Path, key: str) -> None:
        self._look(key)
        super().upload_file(path, key)

    def put(self, key: str, data: bytes) -> None:
        self._look(key)
        super().put(key, data)

    def _look(self, key: str) -> None:
        if key.endswith(self._ending):
            os.kill(os.getpid(), signal.SIGKILL)


Report = Callable[[int, Mapping[str, float]], None]
Save = Callable[[int, Path | None], None]


def trained(model: Path, report: Report, save: Save, resume_from: Path | None = None, steps: int = STEPS) -> Outcome:
    return train(
        model,
        tiny.tokens(ROWS),
        None,
        hyperparameters=tiny.hyperparameters(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=steps,
            save_steps=SAVE_STEPS,
            lora_dropout=0.1,
        ),
        advanced=tiny.advanced(num_train_epochs=EPOCHS, packing="off"),
        hooks=Hooks(report=report, save=save, should_stop=lambda: False),
        resume_from=resume_from,
    )


def run_attempt(folder: Path, job_id: str, attempt: int, kill: Kill | None) -> None:
    """Train from the newest checkpoint there is to the end, or to the kill; a line of `told` a step.

    A worker and its driver's part in checkpoints are in this one process.
    """
    storage = Deadly(folder / "storage", f"/{kill.step}/{kill.before}" if kill and kill.before else "none")
    with (
        (folder / "told").open("a", buffering=1) as told,
        EventWriter(storage, job_id, attempt) as events,
        CheckpointManifests(storage, job_id, attempt, keep=10, events=events, flush=lambda: None) as manifests,
    ):
        # What a driver does that has lost its workers.
        manifests.settle(newest_told(folder))
        newest = (checkpoints(storage, job_id) or [None])[-1]
        told.write(json.dumps({"resumed_from": newest.step if newest else 0}) + "\n")
        with (
            checkpoint_copy(storage, newest) as resume_from,
            Uploads(storage, job_id=job_id, attempt=attempt, keep=10) as uploads,
        ):

            def counts(step: int) -> bool:
                for uploaded in uploads.uploaded():
                    manifests.add(uploaded)
                return step in [0, *(checkpoint.step for checkpoint in checkpoints(storage, job_id))]

            def report(step: int, values: Mapping[str, float]) -> None:
                told.write(json.dumps({"step": step, "loss": values["loss"]}) + "\n")
                counts(0)
                if kill is not None and kill.before is None and step == kill.step:
                    until(lambda: counts(kill.found))
                    os.kill(os.getpid(), signal.SIGKILL)

            def save(step: int, at: Path | None) -> None:
                if at is None:
                    return
                if kill is None or kill.before is None or step != kill.step:
                    uploads.add_checkpoint(step, at)
                    return
                until(lambda: counts(kill.found))
                uploads.add_checkpoint(step, at)
                until(lambda: counts(step))

            outcome = trained(folder / "model", report, save, resume_from)
    outcome.model.save_pretrained(folder / "adapter")


def newest_told(folder: Path) -> int:
    """The last step whose loss was told."""
    lines = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    return max((line["step"] for line in lines if "step" in line), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["worker", "driver"])
def test_a_run_killed_at_any_point_goes_on_as_if_it_had_not_been(tmp_path: Path, lost: str) -> None:
    """A lost worker is started again within its attempt; a lost driver costs the attempt."""
    tiny.make_model(tmp_path / "model")
    whole: dict[int, float] = {}
    outcome = trained(tmp_path / "model", lambda step, values: whole.update({step: values["loss"]}), lambda *_: None)
    outcome.model.save_pretrained(tmp_path / "whole")
    for number, kill in enumerate((*KILLS, None), 1):
        attempt = number if lost == "driver" else 1
        code = workers.exit_code(run_attempt, tmp_path, f"job-{os.getpid()}", attempt, kill)
        assert code == (0 if kill is None else -signal.SIGKILL), kill
    lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    resumed_from = [line["resumed_from"] for line in lines if "resumed_from" in line]
    found = [kill.found if lost == "driver" else kill.found_by_driver or kill.found for kill in KILLS]
    assert resumed_from == [0, *found]
    losses = [(line["step"], line["loss"]) for line in lines if "step" in line]
    assert dict(losses) == whole
    assert set(losses) == set(whole.items()), "a step that was done again had another loss"
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "whole")]
    assert_close(*adapters, tolerance=0.0)


def test_rows_in_another_order_show_in_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, killed = tiny.make_model(tmp_path / "model"), KILLS[1].step

    def losses() -> dict[int, float]:
        found: dict[int, float] = {}
        report: Report = lambda step, values: found.update({step: values["loss"]})  # noqa: E731
        trained(model, report, lambda *_: None, steps=killed + 2)
        return found

    right, plan = losses(), BatchPlan.rows
    assert losses() == right

    def swapped(self: BatchPlan, step: int) -> list[int]:
        """One row of the step after the kill, and one of the step after that, the one in the other's place."""
        taken = {killed + 1: killed + 2, killed + 2: killed + 1}.get(step)
        return plan(self, step) if taken is None else [plan(self, taken)[0], *plan(self, step)[1:]]

    monkeypatch.setattr(BatchPlan, "rows", swapped)
    wrong = losses()
    assert wrong[killed] == right[killed]
    assert abs(wrong[killed + 1] - right[killed + 1]) > 1e-4
