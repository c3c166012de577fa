"""How a job's model did on its held-out rows: before the training, at its checkpoints, and at the end."""

from __future__ import annotations

from pathlib import PurePosixPath

from pydantic import ConfigDict

from tunesmith.frozen import Tolerant
from tunesmith.jobs.attempts import attempt_numbers
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


class Answer(Tolerant):
    """One held-out row: what was asked, what should be answered, and what the model answered."""

    prompt: str
    expected: str
    answer: str


class Evaluation(Tolerant):
    """The model after `step` optimizer steps; after 0 it is the one that the job began with."""

    # JSON has no NaN: a loss that is none is written as the text "NaN", and read as a number again.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int
    rows: int
    """Held-out rows that the loss is over."""
    loss: float
    """Mean over their trained tokens, nats."""
    perplexity: float
    scores: dict[str, float]
    """`bleu`, `rouge1`, `rouge2` and `rougeL` of the answers, 0 to 100; empty where rows ask nothing."""
    answers: list[Answer]
    """To the first of the rows, in their order; the scores are over all. Long texts are shortened."""


def read_evaluations(storage: Storage, job_id: str, *, after: int = -1, limit: int | None = None) -> list[Evaluation]:
    """Evaluations of a job by their step, those above `after`; of those made again, the newest attempt's."""
    found: dict[int, str] = {}
    for attempt in attempt_numbers(storage, job_id):
        for entry in storage.entries(layout.evaluations(job_id, attempt)):
            found[int(PurePosixPath(entry.key).stem)] = entry.key
    steps = sorted(step for step in found if step > after)[:limit]
    return [Evaluation.model_validate_json(storage.get(found[step])) for step in steps]
