"""Every hyperparameter does what its help says: what changes is predicted and seen, and nothing else changes.

A test is named `test_NAME_...`; the last one holds that no name is left out.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.publishing import save_checkpoint
from tests.support.stage import make_manifest
from trainers.attempt.context import Attempt
from trainers.attempt.fetch import Fetched
from trainers.attempt.report_writer import ReportWriter
from trainers.attempt.stop_watch import StopWatch
from trainers.recipe.checkpoint_files import load_adapter
from trainers.recipe.collate import pack, pad
from trainers.recipe.device import pick_device
from trainers.recipe.lora import load_model
from trainers.recipe.loss import loss_sum
from trainers.recipe.strategy import trained_parameters
from trainers.recipe.training_loop import Hooks, Outcome, train
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import encoded
from trainers.text_job.checkpoint_manifests import CheckpointManifests
from trainers.text_job.job_data import wanted_rows
from trainers.text_job.products import write_products
from trainers.text_job.stored_checkpoints import upload_checkpoint
from trainers.text_job.tokenizing import Rows
from trainers.text_job.training_run import fit_with_restarts
from tunesmith.assets.stored_files import describe_files
from tunesmith.assets.tables import describe
from tunesmith.clock import utc_text
from tunesmith.errors import SpecError, WorkerLostError
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import SECTIONS, Advanced, LoraHyperparameters
from tunesmith.hyperparameters.field import Value, definitions
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Checkpoint, EventLine, EventWriter
from tunesmith.jobs.spec import TextJob
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments

ROWS = 16
TOKENIZER = tiny.make_tokenizer()
BASE: dict[str, Value] = {
    "train_data_file": "train.jsonl",
    "learning_rate": 1e-2,
    "lora_rank": 4,
    "lora_alpha": 8,
    "warmup_ratio": 0.0,
    "max_seq_length": 64,
}
"""The run that all others are compared with: 16 rows in 4 steps of 4, at a constant rate."""
BASE_ADVANCED: dict[str, Value] = {"lr_scheduler_type": "constant"}
_ADVANCED_NAMES = {*Advanced.model_fields}


def table(count: int, mark: str = "") -> list[dict[str, Any]]:
    rows = tiny.sums(count)
    return [
        {
            **row,
            "prompt": mark + row["prompt"],
            "q": f"what is {row['prompt']}?",
            "a": row["response"].upper(),
            "past": [["one", "two"], ["three", "four"]][: number % 3],
        }
        for number, row in enumerate(rows)
    ]


FILES = {"train.jsonl": table(ROWS), "more.jsonl": table(8, "more "), "held_out.jsonl": table(6, "held out ")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a dataset, and room for checkpoints."""
    place = tmp_path_factory.mktemp("effects")
    tiny.make_model(place / "model")
    (place / "data").mkdir()
    for name, rows in FILES.items():
        (place / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def make_job(place: Path, **given: Value) -> TextJob:
    """A job of the base run's parameters with `given` over them, of either section."""
    parameters = {**BASE, **{name: value for name, value in given.items() if name not in _ADVANCED_NAMES}}
    more = {**BASE_ADVANCED, **{name: value for name, value in given.items() if name in _ADVANCED_NAMES}}
    return TextJob(
        id="job-1",
        account="operator",
        name="tuned",
        model="tiny@1",
        dataset="data@1",
        training_type="text-question-answering",
        hyperparameters=resolve(LoraHyperparameters, parameters),
        advanced=resolve(Advanced, more),
        flavor="cpu-small",
        cards=1,
        resources={"CPU": 1},
        output_model="tuned@1",
        created_at=utc_text(),
    )


def data(place: Path, **given: Value) -> tuple[TokenizedRows, TokenizedRows | None]:
    """The rows to train on and those held out, of the files that a worker takes; made in this process."""
    tokenizer = tiny.make_tokenizer()

    def made(rows: Rows) -> TokenizedRows:
        options: dict[str, Any] = {"hyperparameters": rows.hyperparameters, "advanced": rows.advanced}
        batches = encoded(rows.files, tokenizer, **options, training_type=rows.training_type, limit=rows.limit)
        return TokenizedRows.of(batches)

    rows, held_out = wanted_rows(make_job(place, **given), fetched(place, "model"), fetched(place, "data"))
    return made(rows), None if held_out is None else made(held_out)


def fetched(place: Path, name: str) -> Fetched:
    folder = place / name
    kind = "dataset" if name == "data" else "model"
    tables = {path.name: describe(path) for path in sorted(folder.iterdir()) if name == "data"}
    return Fetched(folder, make_manifest(kind, name, files=describe_files(folder), tables=tables))


def cells(rows: TokenizedRows) -> list[tuple[list[int], list[bool]]]:
    """Of every row its tokens, and which of them are trained."""
    return [(rows.ids(row).tolist(), rows.trained(row).tolist()) for row in range(len(rows))]


def texts(rows: TokenizedRows) -> list[str]:
    """Every row as text, its trained parts in brackets."""
    found = []
    for ids, trained in cells(rows):
        text, inside = "", False
        for token, flag in zip(ids, trained, strict=True):
            if flag != inside:
                text, inside = text + ("[" if flag else "]"), flag
            text += TOKENIZER.decode([token])
        found.append(text + ("]" if inside else ""))
    return found


def sizes(rows: TokenizedRows) -> list[int]:
    return [len(ids) for ids, _ in cells(rows)]


def trained_tokens(rows: TokenizedRows) -> list[int]:
    return [sum(trained) for _, trained in cells(rows)]


@dataclass
class Run:
    """What a run did, as far as it is seen from outside."""

    job: TextJob
    rows: TokenizedRows
    eval_rows: TokenizedRows | None
    losses: dict[int, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    moments: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By the step of a checkpoint, what its optimizer.safetensors holds; likewise the next."""
    adapters: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    outcome: Outcome | None = None

    @property
    def model(self) -> Any:
        assert self.outcome is not None
        return self.outcome.model

    @property
    def steps(self) -> int:
        assert self.outcome is not None
        return self.outcome.steps

    def seen(self) -> dict[str, object]:
        """All that two runs have in common where they are the same."""
        assert self.outcome is not None
        last = self.adapters[max(self.adapters)]
        return {
            "rows": texts(self.rows),
            "held out": texts(self.eval_rows) if self.eval_rows else None,
            "eval loss": (self.outcome.eval_loss_before, self.outcome.eval_loss),
            "reports": (self.losses, self.rates, self.norms),
            "saved": self.saved,
            "adapter": {name: tensor.numpy().tobytes() for name, tensor in last.items()},
            "weights": sum(p.numel() * p.element_size() for p in self.model.get_base_model().parameters()),
        }


def run(place: Path, **given: Value) -> Run:
    job = make_job(place, **given)
    made = Run(job, *data(place, **given))

    def report(step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            made.losses[step] = values["loss"]
            made.rates.append(values["learning_rate"])
            made.norms.append(values["grad_norm"])

    def save(step: int, folder: Path | None) -> None:
        assert folder is not None
        made.saved.append(step)
        made.moments[step] = load_file(folder / "optimizer.safetensors")
        made.adapters[step] = load_file(folder / "adapter" / "adapter_model.safetensors")

    made.outcome = train(
        place / "model",
        made.rows,
        made.eval_rows,
        hyperparameters=job.hyperparameters,
        advanced=job.advanced,
        hooks=Hooks(report=report, save=save, should_stop=lambda: False),
    )
    return made


@cache
def base_run(place: Path) -> Run:
    return run(place)


def fresh(place: Path, **given: Value) -> Any:
    """The model before its first step."""
    job = make_job(place, **given)
    return load_model(place / "model", job.hyperparameters, job.advanced, pick_device())


def matrices(adapter: Mapping[str, torch.Tensor], which: str) -> dict[str, torch.Tensor]:
    """The A or B matrices of an adapter, by module."""
    return {name.split(f".lora_{which}.")[0]: t for name, t in adapter.items() if f".lora_{which}." in name}


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


# What is refused in this version


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("data_url", "s3://bucket/data", "absent"),
        ("train_url", "s3://bucket/out", "absent"),
    ],
)
def test_data_url_train_url_are_refused_where_they_cannot_run(
    place: Path, name: str, value: Value, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        make_job(place, **{name: value})
    assert caught.value.code == "not_supported"
    assert caught.value.message == f"{name} can only be {allowed} in this version, got {value!r}"
    assert getattr(getattr(make_job(place), _section(name)), name) == (None if allowed == "absent" else "auto")


# What the run begins with


def test_finetuned_model_is_the_adapter_that_the_run_begins_with(place: Path, tmp_path: Path) -> None:
    outcome = base_run(place).outcome
    assert outcome is not None
    outcome.model.save_pretrained(tmp_path)
    model = fresh(place)
    assert any(float(b.abs().max()) == 0 for name, b in model.named_parameters() if "lora_B" in name)
    load_adapter(tmp_path, model)
    tuned = dict(outcome.model.named_parameters())
    assert all(torch.equal(p, tuned[name]) for name, p in model.named_parameters() if p.requires_grad)


# Which rows, and what they say


def test_train_data_file_is_what_is_trained_on_else_all_but_the_test_file(place: Path) -> None:
    assert sizes(data(place, train_data_file="more.jsonl")[0]) == sizes(data(place, train_data_file=None)[0])[6:14]
    for given, count in (
        ({"train_data_file": "train.jsonl"}, ROWS),
        ({"train_data_file": "more.jsonl"}, 8),
        ({"train_data_file": None}, ROWS + 8 + 6),
        ({"train_data_file": None, "test_data_file": "held_out.jsonl"}, ROWS + 8),
    ):
        assert len(data(place, **given)[0]) == count


def test_test_data_file_is_what_is_evaluated_and_none_is_evaluated_without(place: Path) -> None:
    _, held_out = data(place, test_data_file="held_out.jsonl")
    assert held_out is not None
    assert [text.startswith("<|user|>held out say") for text in texts(held_out)] == [True] * 6
    assert data(place)[1] is None
    outcome = base_run(place).outcome
    assert outcome is not None and (outcome.eval_loss_before, outcome.eval_loss) == (None, None)


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (4, 4), (500, 6)])
def test_max_eval_samples_is_how_many_rows_are_evaluated(place: Path, limit: int, count: int) -> None:
    made = run(place, test_data_file="held_out.jsonl", max_eval_samples=limit, max_steps=1)
    assert made.eval_rows is not None and made.outcome is not None
    assert len(made.eval_rows) == count
    # The loss is the mean over the trained tokens of the first rows, one by one.
    model = fresh(place).eval()
    total, tokens = 0.0, 0
    for row in range(count):
        alone = pad(made.eval_rows, [row], torch.device("cpu"))
        with torch.no_grad():
            total += float(loss_sum(model, alone))
        tokens += len(alone.targets)
    assert made.outcome.eval_loss_before == pytest.approx(total / tokens, abs=1e-5)


def test_prompt_field_is_the_column_that_is_asked(place: Path) -> None:
    rows, _ = data(place, prompt_field="q")
    assert texts(rows) == [f"<|user|>{r['q']}<|end|>\n<|assistant|>[{r['response']}<|end|>]" for r in table(ROWS)]


def test_response_field_is_the_column_that_is_trained(place: Path) -> None:
    rows, _ = data(place, response_field="a")
    assert texts(rows) == [f"<|user|>{r['prompt']}<|end|>\n<|assistant|>[{r['a']}<|end|>]" for r in table(ROWS)]


def _past(row: Mapping[str, Any], opening: str = "", closing: str = "") -> str:
    return "".join(f"<|user|>{q}<|end|>\n<|assistant|>{opening}{a}<|end|>{closing}\n" for q, a in row["past"])


def test_history_field_is_the_column_with_the_turns_before(place: Path) -> None:
    rows, _ = data(place, history_field="past", max_seq_length=200)
    plain = [f"<|user|>{r['prompt']}<|end|>\n<|assistant|>[{r['response']}<|end|>]" for r in table(ROWS)]
    assert texts(rows) == [_past(r) + text for r, text in zip(table(ROWS), plain, strict=True)]
    assert texts(data(place)[0]) == plain


def test_train_on_history_trains_the_answers_in_it_and_their_ends(place: Path) -> None:
    options: dict[str, Value] = {"history_field": "past", "max_seq_length": 200}
    off, _ = data(place, **options)
    on, _ = data(place, **options, train_on_history=True)
    assert [ids for ids, _ in cells(on)] == [ids for ids, _ in cells(off)]
    more = [sum(len(answer) + 1 for _, answer in r["past"]) for r in table(ROWS)]
    assert [a - b for a, b in zip(trained_tokens(on), trained_tokens(off), strict=True)] == more
    assert texts(on)[1].startswith(_past(table(2)[1], "[", "]"))


def test_prefix_stands_before_every_prompt(place: Path) -> None:
    rows, _ = data(place, prefix="请回答: ")
    assert all(TOKENIZER.decode(ids).startswith("<|user|>请回答: say ") for ids, _ in cells(rows))
    more = len("请回答: ".encode())  # a token a byte
    plain, _ = data(place)
    assert sizes(rows) == [size + more for size in sizes(plain)]
    assert trained_tokens(rows) == trained_tokens(plain)


@pytest.mark.parametrize(
    ("instruction", "response", "between"),
    [("Q: ", "\nA: ", ("Q: ", "\nA: ")), ("Q: ", None, ("Q: ", "\n")), (None, " => ", ("", " => "))],
)
def test_instruction_template_and_response_template_frame_the_prompt(
    place: Path, instruction: str | None, response: str | None, between: tuple[str, str]
) -> None:
    rows, _ = data(place, prefix="P", instruction_template=instruction, response_template=response)
    before, after = between
    assert texts(rows) == [f"P{before}{r['prompt']}{after}[{r['response']}<|end|>]" for r in table(ROWS)]


def test_max_seq_length_cuts_what_is_longer_and_keeps_the_answers(place: Path) -> None:
    plain, _ = data(place)
    rows, _ = data(place, max_seq_length=16)
    assert max(sizes(plain)) > 16 > min(sizes(plain))
    assert sizes(rows) == [min(16, size) for size in sizes(plain)]
    assert (plain.truncated, rows.truncated) == (0, sum(size > 16 for size in sizes(plain)))
    assert trained_tokens(rows) == trained_tokens(plain)


# How many steps, and what is told and kept of them


@pytest.mark.parametrize(("size", "steps"), [(1, 16), (5, 4), (8, 2), (1024, 1)])
def test_per_device_train_batch_size_is_the_rows_of_a_step(place: Path, size: int, steps: int) -> None:
    assert run(place, per_device_train_batch_size=size).steps == math.ceil(ROWS / size) == steps


def test_gradient_accumulation_steps_make_one_step_of_several_passes(place: Path) -> None:
    accumulated, whole = run(place, gradient_accumulation_steps=2), run(place, per_device_train_batch_size=8)
    assert accumulated.steps == whole.steps == base_run(place).steps / 2
    assert accumulated.losses == pytest.approx(whole.losses, abs=1e-5)


def test_max_steps_ends_a_run_unless_its_data_ends_first(place: Path) -> None:
    base = base_run(place)
    assert base.steps == 4
    short, long = run(place, max_steps=3), run(place, max_steps=1000)
    assert short.losses == {step: base.losses[step] for step in (1, 2, 3)}
    assert long.seen() == base.seen()


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_num_train_epochs_is_how_often_every_row_is_taken(place: Path, epochs: int) -> None:
    made = run(place, num_train_epochs=epochs)
    assert made.steps == epochs * 4
    # Every step's loss is a mean: a run through all rows again finds them better known.
    means = [sum(made.losses[step] for step in range(4 * e + 1, 4 * e + 5)) for e in range(epochs)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (100, [4])])
def test_save_steps_is_the_distance_of_checkpoints_and_the_last_step_has_one(
    place: Path, every: int, steps: list[int]
) -> None:
    assert run(place, save_steps=every).saved == steps


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (100, [4])])
def test_logging_steps_is_the_distance_of_reports_and_changes_no_figure(
    place: Path, every: int, steps: list[int]
) -> None:
    assert run(place, logging_steps=every).losses == {step: base_run(place).losses[step] for step in steps}


@pytest.mark.parametrize("keep", [1, 3])
def test_save_total_limit_is_how_many_checkpoints_stay(place: Path, tmp_path: Path, keep: int) -> None:
    storage, job = FolderStorage(tmp_path), make_job(place, save_total_limit=keep)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{}")
    limit = job.advanced.save_total_limit
    for step in (1, 2, 3, 4):
        save_checkpoint(storage, tmp_path / "checkpoint", job_id=job.id, step=step, keep=limit)
    assert [found.step for found in attempts.checkpoints(storage, job.id)] == [1, 2, 3, 4][-keep:]


@pytest.mark.parametrize("retries", [0, 1])
def test_max_retries_is_how_often_a_run_starts_again(place: Path, tmp_path: Path, retries: int) -> None:
    storage, job, starts = FolderStorage(tmp_path / "storage"), make_job(place, max_retries=retries), list[int | None]()
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path)})
    (tmp_path / "checkpoint").mkdir()

    def fit(resume_from: Checkpoint | None) -> None:
        starts.append(resume_from.step if resume_from is not None else None)
        upload_checkpoint(storage, tmp_path / "checkpoint", job_id=job.id, attempt=1, step=3)
        reports.last_step = 5
        raise WorkerLostError("gone")

    with (
        EventWriter(storage, job.id, 1) as events,
        ReportWriter(storage, job.id, 1, events=events, segment_s=1) as reports,
        CheckpointManifests(storage, job.id, 1, keep=1, events=events, flush=reports.flush) as manifests,
        pytest.raises(WorkerLostError),
    ):
        stop = StopWatch(storage, job.id, 1, deadline=None)
        attempt = Attempt(job, 1, storage, settings, events, stop)
        fit_with_restarts(attempt, job, reports=reports, manifests=manifests, fit=fit)
    # The driver hands the workers the checkpoint to go on from.
    assert starts == [None, 3][: 1 + retries]
    segments = read_segments(storage, layout.events(job.id, 1))
    said = [EventLine.model_validate_json(line) for segment in segments for line in segment.data.splitlines()]
    again = [{"restart": 1, "resumed_from_step": 3, "steps_redone": 2}]
    assert [event.data for event in said if "restart" in event.data] == again[:retries]


# The optimizer: after one step of AdamW from B = 0, all that moved is B, each entry by the learning rate


def test_learning_rate_is_the_size_of_the_first_update(place: Path) -> None:
    for rate in (1e-2, 3e-3):
        made = run(place, learning_rate=rate, max_steps=1)
        assert made.rates == [rate]
        # The update is rate · g / (|g| + 1e-8): ± the rate wherever there is a gradient to speak of.
        steps = torch.cat([b.abs().flatten() for b in matrices(made.adapters[1], "B").values()])
        assert float(steps.max()) == pytest.approx(rate, rel=1e-3)
        assert float(steps.median()) == pytest.approx(rate, rel=1e-2)


def test_lora_alpha_is_the_scale_of_the_first_update(place: Path) -> None:
    one, two = run(place, lora_alpha=8, max_steps=1), run(place, lora_alpha=24, max_steps=1)
    # B is 0 at first: the first loss does not know of alpha, and the gradient of B, the only one, grows with it.
    assert two.losses == one.losses
    assert two.norms[0] == pytest.approx(3 * one.norms[0], rel=1e-4)
    # Adam divides that out of B, so that the weights' change, alpha / rank · B·A, is three times as large.
    changes = []
    for made in (one, two):
        scale = made.job.hyperparameters.lora_alpha / made.job.hyperparameters.lora_rank
        adapter = made.adapters[1]
        a, b = matrices(adapter, "A"), matrices(adapter, "B")
        changes.append({name: scale * b[name] @ a[name] for name in a})
        module = next(m for m in made.model.modules() if hasattr(m, "lora_A"))
        assert module.scaling["default"] == scale
    assert norm(changes[1]) == pytest.approx(3 * norm(changes[0]), rel=1e-2)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lora_rank_is_the_rank_of_every_change_and_sets_the_number_of_weights(place: Path, rank: int) -> None:
    model = fresh(place, lora_rank=rank)
    # Of a layer: q and o 32 × 32, k and v 32 × 16, gate and up 32 × 64, down 64 × 32; each gives rank · (in + out).
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * rank * layer
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {rank}
    assert {p.shape[1] for name, p in model.named_parameters() if "lora_B" in name} == {rank}


def test_lora_dropout_is_the_share_of_inputs_left_out(place: Path) -> None:
    made = run(place, lora_dropout=0.25, max_steps=2)
    dropout = next(m for name, m in made.model.named_modules() if name.endswith("lora_dropout.default"))
    torch.manual_seed(0)
    through = dropout.train()(torch.ones(100_000))
    assert float((through == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(through.max()) == pytest.approx(1 / 0.75)
    # The adapter adds nothing before its first step, so that dropout is seen in the gradient first.
    base = base_run(place)
    assert made.losses[1] == base.losses[1]
    assert made.norms[0] != base.norms[0]
    assert made.losses[2] != base.losses[2]


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_max_grad_norm_is_the_norm_that_larger_gradients_are_scaled_to(place: Path, share: float) -> None:
    before = base_run(place).norms[0]
    made = run(place, max_grad_norm=share * before, max_steps=1)
    assert made.norms[0] == pytest.approx(before)  # what is reported is the norm before
    # Adam's first moment after one step is a tenth of the gradient that it was given.
    moment = norm({name: tensor for name, tensor in made.moments[1].items() if name == "exp_avg"})
    assert moment == pytest.approx(0.1 * min(1.0, share) * before, rel=1e-3)


def test_weight_decay_shrinks_weights_by_its_share_of_the_learning_rate(place: Path) -> None:
    plain, decayed = run(place, max_steps=1), run(place, weight_decay=0.5, max_steps=1)
    kept, shrunk = matrices(plain.adapters[1], "A"), matrices(decayed.adapters[1], "A")
    for name in kept:  # A has no gradient as long as B is 0
        torch.testing.assert_close(shrunk[name], kept[name] * (1 - 1e-2 * 0.5), rtol=1e-6, atol=1e-9)
    assert matrices(plain.adapters[1], "B").keys() == kept.keys()


@pytest.mark.parametrize(
    ("ratio", "shares"),
    [
        (0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        (0.25, [0, 1 / 2, 1, 1, 1, 1, 1, 1]),
        (0.3, [0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1]),  # 2.4 steps, rounded up
        (1.0, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8]),
    ],
)
def test_warmup_ratio_is_the_share_of_steps_over_which_the_learning_rate_rises(
    place: Path, ratio: float, shares: list[float]
) -> None:
    assert run(place, warmup_ratio=ratio, num_train_epochs=2).rates == pytest.approx([1e-2 * s for s in shares])


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_lr_scheduler_type_is_the_course_of_the_learning_rate(place: Path, kind: str, shares: list[float]) -> None:
    assert run(place, lr_scheduler_type=kind).rates == pytest.approx([1e-2 * s for s in shares])


# The model


def test_seed_decides_the_first_weights_and_the_order_of_rows(place: Path) -> None:
    one, same, two = (matrices(fresh(place, seed=seed).state_dict(), "A") for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], two[name]) for name in one)
    # Before any step a batch's loss is that of its rows: other rows, another loss; all rows, the same.
    assert run(place, seed=1).losses[1] != run(place, seed=2).losses[1]
    whole = [run(place, seed=seed, per_device_train_batch_size=ROWS).losses[1] for seed in (1, 2)]
    assert whole[0] == pytest.approx(whole[1], abs=1e-5)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("down_proj", {"down_proj"}),
    ],
)
def test_target_modules_are_those_that_get_an_adapter(place: Path, targets: str, modules: set[str]) -> None:
    adapted = matrices(run(place, target_modules=targets, max_steps=1).adapters[1], "B")
    assert {name.rpartition(".")[2] for name in adapted} == modules
    assert len(adapted) == 2 * len(modules)  # in each of two layers


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_precision_is_the_number_format_of_the_frozen_weights_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # auto is fp32 on a CPU
    model = fresh(place, precision=precision)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_bits_quantize_the_frozen_linear_weights_alone(place: Path) -> None:
    sizes, losses = {}, {}
    for bits in (None, 8, 4):
        model = fresh(place, bits=bits)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        sizes[bits] = sum(p.numel() * p.element_size() for p in frozen)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        losses[bits] = run(place, bits=bits, max_steps=1).losses[1]
    assert sizes[4] < sizes[8] < sizes[None]
    assert losses[8] == pytest.approx(losses[None], rel=0.01)
    assert losses[4] == pytest.approx(losses[None], rel=0.15)
    assert len(set(losses.values())) == 3


def test_gradient_checkpointing_keeps_less_for_the_backward_pass_and_changes_no_figure(place: Path) -> None:
    base, made = base_run(place), run(place, gradient_checkpointing=True)
    assert made.losses == pytest.approx(base.losses, abs=1e-5)
    kept = {}
    for on in (False, True):
        size = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        model = fresh(place, gradient_checkpointing=on).train()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss_sum(model, pack(base.rows, [0, 1, 2, 3], torch.device("cpu")))
        kept[on] = size
    assert kept[True] < 0.5 * kept[False]


def test_strategy_auto_is_ddp_for_one_worker(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainers.recipe.training_loop"):
        assert run(place, strategy="ddp").seen() == run(place, strategy="auto").seen()
    assert [message for message in caplog.messages if message.startswith("strategy")] == ["strategy ddp, 1 workers"] * 2


def test_packing_changes_how_rows_are_laid_out_and_no_figure(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainers.recipe.training_loop"):
        assert run(place, packing="off").losses == pytest.approx(run(place, packing="auto").losses, abs=1e-5)
    assert [message for message in caplog.messages if message.startswith("rows are")] == [
        "rows are padded: packing is off",
        "rows are packed, what those of a pass begin with is computed once",
    ]


@pytest.mark.parametrize("merge", [True, False])
def test_merge_adapter_puts_whole_weights_beside_the_adapter(place: Path, tmp_path: Path, merge: bool) -> None:
    made = run(place, merge_adapter=merge, max_steps=2)
    write_products(made.model, trained_parameters(made.model), place / "model", tmp_path, made.job, "/s")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert "adapter/adapter_model.safetensors" in files
    assert ({"model.safetensors", "config.json", "tokenizer.json"} <= files) is merge
    assert ("model.safetensors" in files) is merge


# All of them


OTHERS: dict[str, Value] = {
    "train_data_file": "more.jsonl",
    "test_data_file": "held_out.jsonl",
    "prompt_field": "q",
    "response_field": "a",
    "history_field": "past",
    "prefix": "P",
    "instruction_template": "Q: ",
    "response_template": "A: ",
    "lora_alpha": 16,
    "lora_dropout": 0.5,
    "lora_rank": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "save_steps": 2,
    "logging_steps": 2,
    "learning_rate": 2e-2,
    "max_grad_norm": 1e-3,
    "warmup_ratio": 0.5,
    "max_seq_length": 16,
    "bits": 4,
    "max_eval_samples": 2,
    "num_train_epochs": 2,
    "seed": 1,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.5,
    "target_modules": "q_proj",
    "train_on_history": True,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "strategy": "ddp",
    "packing": "off",
    "save_total_limit": 1,
    "max_retries": 0,
    "merge_adapter": False,
}
"""Another value than that of the base run, for every name that has one."""
NEEDED: dict[str, dict[str, Value]] = {
    "max_eval_samples": {"test_data_file": "held_out.jsonl"},
    "train_on_history": {"history_field": "past"},
}
"""What a name has no effect without."""
OUTSIDE = {"strategy", "save_total_limit", "max_retries", "merge_adapter"}
"""Names that change what is around a run and no figure of it."""


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_value_gives_the_same_run_and_another_value_another(place: Path, name: str) -> None:
    needed = NEEDED.get(name, {})
    base = run(place, **needed) if needed else base_run(place)
    one, two = (run(place, **{**needed, name: OTHERS[name]}) for _ in range(2))
    assert getattr(getattr(base.job, _section(name)), name) != OTHERS[name]
    assert one.seen() == two.seen()
    changed = [part for part, value in one.seen().items() if value != base.seen()[part]]
    if name in ("gradient_checkpointing", "packing"):
        assert changed in ([], ["reports", "adapter"])  # the last digits, where sums are made in another order
    else:
        assert (changed == []) is (name in OUTSIDE)


def _section(name: str) -> str:
    return "advanced" if name in _ADVANCED_NAMES else "hyperparameters"


def test_every_hyperparameter_has_a_test_of_its_effect() -> None:
    tests = "".join(f"_{name.removeprefix('test_')}_" for name in globals() if name.startswith("test_"))
    for h in chain.from_iterable(map(definitions, SECTIONS)):
        assert f"_{h.name}_" in tests
        assert h.name in (*OTHERS, "finetuned_model") or h.supported == (None,)  # that one needs a platform
