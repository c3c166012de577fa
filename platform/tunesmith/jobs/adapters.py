"""An earlier result that a job continues (`finetuned_model`): which adapter it is, and whether it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunesmith.assets.catalog import Manifest, get_manifest
from tunesmith.assets.stored_files import StoredFiles
from tunesmith.errors import SpecError
from tunesmith.hyperparameters.definitions import LoraHyperparameters
from tunesmith.hyperparameters.field import Hyperparameter
from tunesmith.jobs import attempts
from tunesmith.jobs.spec import TrainJob, parse_job
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

FIELD = "hyperparameters.finetuned_model"
FOLDER = "adapter"
"""Where a model's files, or a checkpoint, hold its adapter."""

_CHECKPOINT = re.compile(
    r"jobs/([a-z0-9][a-z0-9._-]*)/attempts/([1-9]\d{0,8})/checkpoints/([1-9]\d{0,8})(?:/adapter)?/?"
)


@dataclass(frozen=True)
class Adapter:
    """The adapter of a published model, or of a job's checkpoint."""

    ref: str
    """`NAME@VERSION` of the model, or the checkpoint's key `jobs/ID/attempts/N/checkpoints/STEP`."""
    rank: int
    alpha: int

    def as_defaults(self, known: Iterable[Hyperparameter]) -> tuple[Hyperparameter, ...]:
        """`known` with this adapter's rank and scale for defaults."""
        own = {"lora_rank": self.rank, "lora_alpha": self.alpha}
        return tuple(replace(h, default=own.get(h.name, h.default)) for h in known)

    def check(self, hyperparameters: LoraHyperparameters) -> None:
        """Raise SpecError where a job asks for another rank or scale, which the adapter cannot have."""
        for name, own, given in (
            ("lora_rank", self.rank, hyperparameters.lora_rank),
            ("lora_alpha", self.alpha, hyperparameters.lora_alpha),
        ):
            if given != own:
                raise SpecError(
                    f"{self.ref} was tuned with {name} {own}, so {name} must be {own}, got {given}",
                    fields=[f"hyperparameters.{name}", FIELD],
                    hint=f"leave {name} out",
                    code="adapter_does_not_fit",
                )


def find_adapter(storage: Storage, given: str, model: Manifest) -> Adapter:
    """The adapter of the earlier result `given` for the base `model`.

    `given` is a model, as `NAME`, `NAME@VERSION` or its path in `storage`; or the path of a job's checkpoint, or the
    job's id for its newest one. Raises SpecError where there is no such thing, where it holds no adapter, where the
    adapter is one of another base, or where the attempt that made the checkpoint has not ended.
    """
    checkpoint = _checkpoint(storage, given)
    if checkpoint is not None:
        job_id, attempt, step = checkpoint
        return _of_checkpoint(storage, job_id, attempt=attempt, step=step, model=model)
    manifest = get_manifest(storage, "model", _ref(storage, given), field=FIELD)
    if not manifest.details.get("adapter"):
        raise SpecError(
            f"{manifest.ref} holds no adapter to continue from",
            fields=[FIELD],
            hint=f"to tune it as it is, give it as the model: model={manifest.ref}",
            code="adapter_does_not_fit",
        )
    return _read(storage, manifest.ref, base=str(manifest.base), model=model)


def adapter_files(storage: Storage, ref: str) -> StoredFiles:
    """The files of the adapter of `ref` (Adapter.ref). SpecError or NotFoundError where it was deleted meanwhile."""
    whole = attempts.checkpoint_files(storage, ref) if "/" in ref else get_manifest(storage, "model", ref).stored
    return whole.below(FOLDER)


def _read(storage: Storage, ref: str, *, base: str, model: Manifest) -> Adapter:
    if base != model.ref:
        raise SpecError(
            f"{ref} is an adapter for {base}, not for {model.ref}",
            fields=["model", FIELD],
            hint=f"give its base as the model, model={base}, or leave finetuned_model out",
            code="adapter_does_not_fit",
        )
    config = json.loads(adapter_files(storage, ref).read(storage, "adapter_config.json"))
    return Adapter(ref, config["r"], config["lora_alpha"])


def _checkpoint(storage: Storage, given: str) -> tuple[str, int | None, int | None] | None:
    """Job, attempt and step of a checkpoint's path; job alone for a job's id; None for anything else."""
    match = _CHECKPOINT.fullmatch(given.removeprefix(f"{storage.url}/"))
    if match is not None:
        return match[1], int(match[2]), int(match[3])
    is_job = layout.NAME.fullmatch(given) is not None and storage.exists(layout.job_json(given))
    return (given, None, None) if is_job else None


def _of_checkpoint(storage: Storage, job_id: str, *, attempt: int | None, step: int | None, model: Manifest) -> Adapter:
    whole = [
        checkpoint
        for checkpoint in attempts.checkpoints(storage, job_id)
        if attempt is None or (checkpoint.attempt, checkpoint.step) == (attempt, step)
    ]
    if not whole:
        what = "no checkpoint" if attempt is None else f"no whole checkpoint of step {step} from attempt {attempt}"
        there = ", ".join(checkpoint.key for checkpoint in attempts.checkpoints(storage, job_id))
        raise SpecError(
            f"job {job_id} has {what} to continue from",
            fields=[FIELD],
            hint=f"it has {there}" if there else "leave finetuned_model out",
            code="unknown_checkpoint",
        )
    newest = whole[-1]
    if attempts.read_result(storage, job_id, newest.attempt) is None:
        raise SpecError(
            f"job {job_id} is at work on attempt {newest.attempt}: its checkpoints come and go",
            fields=[FIELD],
            hint=f"wait for its end, or stop it: `tunesmith jobs stop {job_id}`",
            code="job_not_ended",
        )
    job = parse_job(storage.get(layout.job_json(job_id)))
    assert isinstance(job, TrainJob), "a registration makes no checkpoint"
    return _read(storage, newest.key, base=job.model, model=model)


def _ref(storage: Storage, given: str) -> str:
    """`NAME@VERSION` for a path `ROOT/models/NAME/VERSION…`; anything else as it is."""
    inside = given.removeprefix(f"{storage.url}/").split("/")
    if given.startswith(f"{storage.url}/") and len(inside) >= 3 and inside[0] == layout.ASSET_FOLDERS["model"]:
        return f"{inside[1]}@{inside[2]}"
    if "/" in given:
        raise SpecError(
            f"finetuned_model must be NAME@VERSION of a model, its path below {storage.url}/models, a job's id, or the "
            f"path of a checkpoint, {storage.url}/jobs/ID/attempts/N/checkpoints/STEP, got {given!r}",
            fields=[FIELD],
            hint="`tunesmith models list` and `tunesmith jobs list` show those there are",
        )
    return given
