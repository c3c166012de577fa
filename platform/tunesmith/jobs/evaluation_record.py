"""How a job's model did on its held-out rows: before the training, at its checkpoints, and at the end."""

from __future__ import annotations

from pydantic import ConfigDict

from tunesmith.frozen import Tolerant


class Answer(Tolerant):
    """One held-out row: what was asked, what should be answered, and what the model answered."""

    prompt: str
    expected: str
    answer: str


class Evaluation(Tolerant):
    """The model after `step` optimizer steps; after 0 it is the one that the job began with."""

    # JSON has no NaN: a loss that is not a number is written as the text "NaN", and read as a number again.
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
