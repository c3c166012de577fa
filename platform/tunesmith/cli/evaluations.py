"""`jobs evaluations`: how a job's model did on held-out rows, base and tuned side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunesmith.cli import rendering
from tunesmith.cli.jobs import JobId
from tunesmith.cli.session import AsJson, answer, open_client
from tunesmith.cli.terminal import shown

if TYPE_CHECKING:
    from tunesmith.jobs.evaluation_record import Evaluation

_SHORT = 400
"""Characters of a text that are shown."""


def evaluations(
    job_id: JobId,
    rows: Annotated[int, typer.Option(min=0, help="Answers to show, base and tuned side by side.")] = 5,
    as_json: AsJson = False,
) -> None:
    """How the model did on the held-out rows: loss and scores by step, and answers beside its base's."""
    from tunesmith.api.client import read_on
    from tunesmith.api.views import Page
    from tunesmith.jobs.evaluation_record import Evaluation

    with open_client() as client:
        made, place = read_on(lambda after: client.evaluations(job_id, after=after))
    page = Page[Evaluation](items=made, next=place)
    answer(page, as_json, lambda: Group(by_step(made), *side_by_side(made, rows=rows)))


def by_step(made: Sequence[Evaluation]) -> Table:
    """Loss, perplexity and scores, a row a step."""
    names = list(dict.fromkeys(name for each in made for name in each.scores))
    rows = (
        (each.step, f"{each.loss:.4f}", f"{each.perplexity:.4g}", *(f"{each.scores[name]:.1f}" for name in names))
        for each in made
    )
    return rendering.table(("STEP", "LOSS", "PERPLEXITY", *map(str.upper, names)), rows)


def side_by_side(made: Sequence[Evaluation], *, rows: int) -> list[Table]:
    """The answers before the training beside the newest ones; nothing where none were made."""
    if not made or not made[0].answers or rows == 0:
        return []
    base, tuned = made[0], made[-1]
    answers = Table(show_lines=True, expand=True, title="Held-out prompts")
    heads = ("prompt", "expected", f"base (step {base.step})", f"tuned (step {tuned.step})")
    for head, style in zip(heads, ("", "cyan", "yellow", "green"), strict=True):
        answers.add_column(head, style=style, ratio=1, overflow="fold")
    for before, after in list(zip(base.answers, tuned.answers, strict=True))[:rows]:
        cells = (before.prompt, before.expected, before.answer, after.answer)
        answers.add_row(*(Text(shown(_shortened(cell), lines=True)) for cell in cells))
    return [answers]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
