"""What an audit of tokenised data has found, before any training; saved with the job and shown to people."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.frozen import Tolerant


class AuditCounts(Tolerant):
    """Over all rows. Counts of parts add up."""

    read: int = 0
    """Rows read."""
    rows: int = 0
    """Rows kept."""
    skipped: int = 0
    """Rows without a prompt or a response."""
    truncated: int = 0
    """Rows that lost tokens to `max_seq_length`."""
    untrained: int = 0
    """Rows kept that have no trained token to predict."""
    answer_cut: int = 0
    """Rows kept whose last answer lost its end, and with it the end of turn."""
    ended: int = 0
    """Rows kept whose end of turn is trained."""
    spelled_out: int = 0
    """Rows kept whose text spells out a control token, which was taken as plain text."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row kept."""
    lengths: dict[int, int] = Field(default={})
    """Rows kept by length: the upper bound of each class, a power of two, and its rows."""

    def __add__(self, other: AuditCounts) -> AuditCounts:
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in AuditCounts.model_fields
            if name not in ("longest", "lengths")
        }
        lengths = {
            bound: self.lengths.get(bound, 0) + other.lengths.get(bound, 0)
            for bound in sorted({*self.lengths, *other.lengths})
        }
        return AuditCounts(**sums, longest=max(self.longest, other.longest), lengths=lengths)


class Finding(Tolerant):
    """What is wrong, or may be."""

    level: Literal["refused", "warning"]
    """`refused`: no job is trained on these rows."""
    code: str
    message: str
    hint: str | None = None


class AuditedRow(Tolerant):
    """A row as it is trained."""

    row: int
    """Its number among the rows kept, from 0."""
    tokens: int
    pieces: list[tuple[str, bool]]
    """Its text in turn, each piece with whether it is trained; long pieces without their middle."""


class AuditReport(Tolerant):
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
