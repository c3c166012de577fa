"""What a user asks for (a spec) and what a job runs with (a job: the spec with every default filled in)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, WithJsonSchema

from tunesmith.bounds import MAX_RUN_TIME_S, VALUES_SCHEMA, Line, SourceText, check_values
from tunesmith.errors import SpecError, nearest
from tunesmith.frozen import Frozen
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters, SharedAdvanced
from tunesmith.hyperparameters.field import Value, json_schema
from tunesmith.visible_text import visible

# A custom model has names of its own.
_HYPERPARAMETERS = {**json_schema(LoraHyperparameters), **VALUES_SCHEMA}

Values = Annotated[dict[str, Any], AfterValidator(check_values)]
"""Hyperparameters before it is known which there are."""


class TrainSpec(Frozen):
    """An order for a training run (docs/contracts.md, section 9)."""

    kind: Literal["train"] = "train"
    name: Line | None = None
    """What the user calls the job; default: the output model's name."""
    model: Line
    dataset: Line
    training_type: Line | None = None
    """`text-question-answering`, `text-generation` or `custom`; default: the model's."""
    method: Line | None = None
    """Default: `LoRA`; with `custom`, the only method in the model's `train_params.json`."""
    hyperparameters: Annotated[Values, WithJsonSchema(_HYPERPARAMETERS)] = Field(default={})
    """Those of the text recipe; with `custom`, those of the method."""
    advanced: Annotated[Values, WithJsonSchema(json_schema(Advanced))] = Field(default={})
    flavor: Line
    cards: int = Field(default=1, ge=1, le=1024)
    output_model: Line
    priority: int = Field(default=0, ge=-100, le=100)
    max_run_time_s: int | None = Field(default=None, ge=1, le=MAX_RUN_TIME_S)


class RegisterSpec(Frozen):
    """A request to take files from `source` in as a new version of a model or dataset."""

    kind: Literal["register"] = "register"
    asset: Literal["model", "dataset"]
    name: Line
    source: SourceText
    """A folder, a file, or an `s3://` or `obs://` prefix that the cluster can read."""
    task_type: Line | None = None
    """For models: default is what the card's front matter says (`task_type`)."""


Spec = Annotated[TrainSpec | RegisterSpec, Field(discriminator="kind")]


class Output(NamedTuple):
    """The new model or dataset that a job makes."""

    kind: Literal["model", "dataset"]
    name: str
    version: int


class TrainJob(Frozen):
    """`job.json` of a training run: everything the driver needs, never a secret. It is a TextJob or a CustomJob.

    It names models and datasets by reference; they lie in the storage that `job.json` itself is read from.
    """

    schema_version: Literal[1] = 1
    id: str
    account: str
    kind: Literal["train"] = "train"
    name: str
    model: str
    """`NAME@VERSION`, the version always given."""
    dataset: str
    training_type: str
    method: str
    hyperparameters: LoraHyperparameters | Mapping[str, Value]
    advanced: SharedAdvanced
    flavor: str
    cards: int
    resources: dict[str, float]
    """Ray resources of one worker; the job has `cards` workers."""
    output_model: str
    """`NAME@VERSION` of the new model."""
    priority: int = 0
    max_run_time_s: int | None = None
    created_at: str

    @property
    def output(self) -> Output:
        """What the job makes."""
        return _output("model", self.output_model)

    def with_version(self, version: int) -> Self:
        """The same job, with another version of its output."""
        return self.model_copy(update={"output_model": f"{self.output.name}@{version}"})


class TextJob(TrainJob):
    """A training run of the built-in text recipe."""

    training_type: Literal["text-question-answering", "text-generation"]
    method: Literal["LoRA"] = "LoRA"
    hyperparameters: LoraHyperparameters
    advanced: Advanced


class CustomJob(TrainJob):
    """A training run of the model's own `train.py`, or of its image."""

    training_type: Literal["custom"]
    hyperparameters: Mapping[str, Value]
    """What `train.py` gets."""


class RegisterJob(Frozen):
    """`job.json` of a registration: copy, check, and publish as `output_asset`."""

    schema_version: Literal[1] = 1
    id: str
    account: str
    kind: Literal["register"] = "register"
    name: str
    asset: Literal["model", "dataset"]
    source: str
    task_type: str | None = None
    output_asset: str
    """`NAME@VERSION` of the new model or dataset."""
    created_at: str

    @property
    def output(self) -> Output:
        """What the job makes."""
        return _output(self.asset, self.output_asset)

    def with_version(self, version: int) -> Self:
        """The same job, with another version of its output."""
        return self.model_copy(update={"output_asset": f"{self.output.name}@{version}"})


AnyTrainJob = Annotated[TextJob | CustomJob, Field(discriminator="training_type")]
Job = Annotated[AnyTrainJob | RegisterJob, Field(discriminator="kind")]

_SPEC: TypeAdapter[TrainSpec | RegisterSpec] = TypeAdapter(Spec)
_JOB: TypeAdapter[TextJob | CustomJob | RegisterJob] = TypeAdapter(Job)


_MOST_SAID = 20
"""Faults that are told at once."""
_TAGS = ("train", "register", "body", "text-question-answering", "text-generation", "custom")
"""What pydantic puts into the path of a field to say which kind of a union it is of."""


def parse_spec(data: Any) -> TrainSpec | RegisterSpec:
    """A spec from decoded JSON or YAML; SpecError names every field at fault."""
    if isinstance(data, dict) and "kind" not in data:
        data = {"kind": "train", **data}
    try:
        return _SPEC.validate_python(data)
    except ValidationError as error:
        raise spec_error(error) from None


def parse_job(text: str | bytes) -> Job:
    """A job from the text of its `job.json`; SpecError says what is wrong with it."""
    try:
        return _JOB.validate_json(text)
    except ValidationError as error:
        raise spec_error(error) from None


def spec_error(error: ValidationError) -> SpecError:
    """One SpecError out of pydantic's list: each field, what was given, what is allowed."""
    return refusal(error.errors(include_url=False))


def refusal(items: Iterable[Mapping[str, Any]]) -> SpecError:
    """As spec_error, from the list itself: FastAPI has one of its own."""
    fields, sentences, hint = [], [], None
    for item in islice(items, _MOST_SAID):
        path = ".".join(visible(str(part), limit=80) for part in item["loc"] if part not in _TAGS)
        fields.append(path)
        if item["type"] == "extra_forbidden":
            known = [*TrainSpec.model_fields, *RegisterSpec.model_fields]
            hint = hint or nearest(path, known)
            sentences.append(f"there is no field {path!r}")
        elif item["type"] == "missing":
            sentences.append(f"{path} is missing")
        else:
            sentences.append(f"{path or 'the document'}: {item['msg']}, got {_short(item['input'])}")
    return SpecError("; ".join(sentences), fields=fields, hint=hint)


def _output(kind: Literal["model", "dataset"], ref: str) -> Output:
    name, _, version = ref.partition("@")
    return Output(kind, name, int(version))


def _short(value: Any, limit: int = 80) -> str:
    # Of a large thing not all is spelled out, and of a long number Python refuses to.
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a number of more than 300 digits"
    if isinstance(value, str):
        value = value[:limit]
    return visible(repr(value), limit=limit)
