"""From a spec to a job: every name looked up, every rule checked, every default filled in.

Used alike by the front door and by `tunesmith jobs render`; reads manifests from storage and nothing else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tunesmith.assets import image_references
from tunesmith.assets.catalog import Manifest, get_manifest, newest_version
from tunesmith.assets.gallery import advanced as gallery_advanced
from tunesmith.assets.gallery import fill_in
from tunesmith.assets.training_types import CUSTOM
from tunesmith.errors import DataError, SpecError, nearest
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters, SharedAdvanced, for_model
from tunesmith.hyperparameters.field import Value
from tunesmith.jobs.adapters import find_adapter
from tunesmith.jobs.flavors import Flavor, get_flavor, load_flavors
from tunesmith.jobs.spec import CustomJob, Job, RegisterJob, RegisterSpec, TextJob, TrainSpec
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.text.columns import find_format


def new_job_id() -> str:
    """A new job's id: `job-`, the time in milliseconds and 32 random bits, in hexadecimal; grows with time."""
    return f"job-{time.time_ns() // 1_000_000:012x}{secrets.token_hex(4)}"


def draft(
    spec: TrainSpec | RegisterSpec,
    *,
    storage: Storage,
    account: str,
    job_id: str,
    created_at: str,
    capacity: Callable[[], Mapping[str, float]] | None = None,
) -> Job:
    """Check `spec` and fill it in; the output's version is one above the newest in storage until the job is recorded.

    `capacity`: all resources of the cluster; without it, what only some clusters have is left to the job to find out.
    Raises SpecError, or DataError for a dataset without the named columns, that says what was given, what is allowed
    and what to do.
    """
    if isinstance(spec, RegisterSpec):
        return _draft_registration(spec, storage=storage, account=account, job_id=job_id, created_at=created_at)
    layout.check_name(spec.output_model, field="output_model")
    flavor = get_flavor(spec.flavor)
    model = get_manifest(storage, "model", spec.model)
    dataset = get_manifest(storage, "dataset", spec.dataset)
    training_type = _training_type(spec, model)
    if training_type == CUSTOM:
        settled = _settle_custom(spec, model, capacity)
    else:
        settled = _settle_text(
            spec, model=model, dataset=dataset, training_type=training_type, flavor=flavor, storage=storage
        )
    version = newest_version(storage, "model", spec.output_model) + 1
    return (CustomJob if training_type == CUSTOM else TextJob)(
        id=job_id,
        account=account,
        name=spec.name or spec.output_model,
        model=model.ref,
        dataset=dataset.ref,
        training_type=training_type,
        method=settled.method,
        hyperparameters=settled.hyperparameters,
        advanced=settled.advanced,
        flavor=spec.flavor,
        cards=spec.cards,
        resources={**flavor.resources(), **settled.resources},
        output_model=f"{spec.output_model}@{version}",
        priority=spec.priority,
        max_run_time_s=spec.max_run_time_s,
        created_at=created_at,
    )


def _draft_registration(
    spec: RegisterSpec, *, storage: Storage, account: str, job_id: str, created_at: str
) -> RegisterJob:
    layout.check_name(spec.name, field="name")
    version = newest_version(storage, spec.asset, spec.name) + 1
    return RegisterJob(
        id=job_id,
        account=account,
        name=f"register-{spec.asset}-{spec.name}",
        asset=spec.asset,
        source=spec.source,
        task_type=spec.task_type,
        output_asset=f"{spec.name}@{version}",
        created_at=created_at,
    )


def _training_type(spec: TrainSpec, model: Manifest) -> str:
    """The one asked for, or the model's default."""
    types = model.training
    if types.default is None:
        raise SpecError(
            f"{model.ref} cannot be trained: {types.reason}",
            fields=["model"],
            hint="`tunesmith models check DIR` says what its folder needs; register it again",
            code="not_trainable",
        )
    asked = spec.training_type or types.default
    if asked in types.allowed:
        return asked
    why = f"; {types.reason}" if types.reason and asked == CUSTOM else ""
    raise SpecError(
        f"{model.ref} cannot be trained with training_type {asked!r}; allowed: {', '.join(types.allowed)}{why}",
        fields=["training_type"],
        hint="leave training_type out to train with the model's own",
        code="training_type_not_allowed",
    )


@dataclass(frozen=True)
class _Settled:
    """What depends on the way of training."""

    method: str
    hyperparameters: LoraHyperparameters | Mapping[str, Value]
    advanced: SharedAdvanced
    resources: Mapping[str, float] = field(default_factory=dict)
    """Ray's, of one worker, besides the flavor's."""


def _settle_text(
    spec: TrainSpec, *, model: Manifest, dataset: Manifest, training_type: str, flavor: Flavor, storage: Storage
) -> _Settled:
    method = spec.method or LoraHyperparameters.method
    if method != LoraHyperparameters.method:
        raise SpecError(
            f"the method of training_type {training_type!r} is {LoraHyperparameters.method}, got {method!r}",
            fields=["method"],
            hint=nearest(method, [LoraHyperparameters.method])
            or "the methods of train_params.json go with training_type: custom",
            code="unknown_method",
        )
    known = for_model(LoraHyperparameters, model.details)
    earlier = spec.hyperparameters.get("finetuned_model")
    adapter = find_adapter(storage, earlier, model) if isinstance(earlier, str) else None
    if adapter is not None:
        known = adapter.as_defaults(known)
    hyperparameters = resolve(LoraHyperparameters, spec.hyperparameters, known=known)
    if adapter is not None:
        adapter.check(hyperparameters)
        hyperparameters = hyperparameters.model_copy(update={"finetuned_model": adapter.ref})
    advanced = resolve(Advanced, spec.advanced)
    _check_bits(hyperparameters.bits, advanced.strategy, flavor)
    _check_files(dataset, hyperparameters)
    _check_columns(dataset, hyperparameters, training_type)
    return _Settled(method, hyperparameters, advanced)


def _settle_custom(spec: TrainSpec, model: Manifest, capacity: Callable[[], Mapping[str, float]] | None) -> _Settled:
    gallery = model.gallery
    assert gallery is not None, "the training types say that it is there"
    method = gallery.method(spec.method)
    hyperparameters, advanced = fill_in(method, spec.hyperparameters), gallery_advanced(spec.advanced)
    if gallery.image_url is None:
        return _Settled(method.name, hyperparameters, advanced)
    if capacity is not None:
        image_references.check_cluster(capacity(), model=model.ref)
    return _Settled(method.name, hyperparameters, advanced, {image_references.RESOURCE: image_references.SHARE})


def _check_bits(bits: int | None, strategy: str, flavor: Flavor) -> None:
    """bitsandbytes, which quantizes, knows no NPU; DeepSpeed would divide packed weights as if they were numbers."""
    if bits is None:
        return
    if strategy in ("zero3", "zero3_offload"):
        raise SpecError(
            f"bits={bits} cannot be combined with strategy {strategy!r}, which divides the base among workers",
            fields=["hyperparameters.bits", "advanced.strategy"],
            hint="leave bits out, or choose the strategy auto, ddp, zero1 or zero2",
        )
    if flavor.accelerator != "NPU":
        return
    able = ", ".join(other.name for other in load_flavors().values() if other.accelerator != "NPU")
    raise SpecError(
        f"bits={bits} cannot run on flavor {flavor.name!r}: a quantized base trains on CPUs and GPUs, not on NPUs",
        fields=["hyperparameters.bits", "flavor"],
        hint=f"leave bits out, or choose one of {able}",
        code="not_supported",
    )


def _check_files(dataset: Manifest, hyperparameters: LoraHyperparameters) -> None:
    for name, wanted in (
        ("train_data_file", hyperparameters.train_data_file),
        ("test_data_file", hyperparameters.test_data_file),
    ):
        if wanted is not None and wanted not in dataset.tables:
            raise DataError(
                f"{dataset.ref} has no data file {wanted!r}; it has {', '.join(dataset.tables)}",
                fields=[f"hyperparameters.{name}"],
                hint=nearest(wanted, dataset.tables),
                code="unknown_file",
            )
    if not training_files(dataset.tables, hyperparameters):
        raise DataError(
            f"{dataset.ref} has no file to train on besides the test file {hyperparameters.test_data_file!r}",
            fields=["hyperparameters.test_data_file"],
            code="no_training_data",
        )


def training_files(paths: Iterable[str], hyperparameters: LoraHyperparameters) -> list[str]:
    """The data files of a dataset that are trained on: the named one, or all but the test file."""
    named = hyperparameters.train_data_file
    return [named] if named is not None else [p for p in paths if p != hyperparameters.test_data_file]


def _check_columns(dataset: Manifest, hyperparameters: LoraHyperparameters, training_type: str) -> None:
    files = training_files(dataset.tables, hyperparameters)
    if hyperparameters.test_data_file is not None:
        files = [*files, hyperparameters.test_data_file]
    for path in files:
        find_format(
            dataset.tables[path].columns,
            hyperparameters,
            training_type=training_type,
            file=f"{path} of {dataset.ref}",
        )
