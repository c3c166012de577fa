"""What an audit of tokenised data has found, before any training; saved with the job and shown to people."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    # The docstrings of fields are their descriptions in the OpenAPI document.
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class AuditCounts(_Part):
    """Over all rows."""

    read: int
    """Rows read."""
    rows: int
    """Rows kept."""
    skipped: int
    """Rows without a prompt or a response."""
    truncated: int
    """Rows that lost tokens to `max_seq_length`."""
    untrained: int
    """Rows kept that have no trained token to predict."""
    answer_cut: int
    """Rows kept whose last answer lost its end, and with it the end of turn."""
    ended: int
    """Rows kept whose end of turn is trained."""
    spelled_out: int
    """Rows kept whose text spells out a control token, which was taken as plain text."""
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest row kept."""
    lengths: dict[int, int]
    """Rows kept by length: the upper bound of each class, a power of two, and its rows."""


class Finding(_Part):
    """What is wrong, or may be."""

    level: Literal["refused", "warning"]
    """`refused`: no job is trained on these rows."""
    code: str
    message: str
    hint: str | None = None


class AuditedRow(_Part):
    """A row as it is trained."""

    row: int
    """Its number among the rows kept, from 0."""
    tokens: int
    pieces: list[tuple[str, bool]]
    """Its text in turn, each piece with whether it is trained; long pieces without their middle."""


class AuditReport(_Part):
    """The audit of one dataset for one model and one job's settings."""

    model: str
    dataset: str
    counts: AuditCounts
    checked: int
    """Rows that were decoded and compared with what was asked and answered."""
    off: int
    """Those of them whose prompt is not what generation gives the model, or whose answer is not what is trained."""
    merged: int
    """Those of them where a token would reach from the prompt into the answer; the prompt keeps its own tokens."""
    ends: list[str]
    """The tokens that end the checked rows."""
    findings: list[Finding]
    rows: list[AuditedRow]
    """A few of the rows."""

    @property
    def refusal(self) -> Finding | None:
        """Why no job is trained on these rows, if so."""
        return next((finding for finding in self.findings if finding.level == "refused"), None)
