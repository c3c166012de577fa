"""`datasets audit` and `jobs audit`: what a job would train, or trains, token by token."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import rendering
from tunesmith.cli.jobs import JobId
from tunesmith.cli.order_options import Advanced, Set, Type
from tunesmith.cli.session import REFUSED, AsJson, messages, open_client, output, read_settings
from tunesmith.cli.spec_files import with_flags
from tunesmith.cli.terminal import echo_json, shown
from tunesmith.errors import TunesmithError, UnavailableError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.jobs.audit_report import AuditedRow, AuditReport

Dataset = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version: the newest.")]
Model = Annotated[str, typer.Option(metavar="NAME[@VERSION]", help="What would be tuned.")]
Rows = Annotated[int | None, typer.Option("--rows", min=1, help="Look at so many rows alone; default: all.")]

_TRAINED, _CONTEXT = "bold green", "dim"
_BAR = 40
"""Characters of the longest bar of the histogram."""


def audit_dataset(
    dataset: Dataset,
    *,
    model: Model,
    training_type: Type = None,
    set_: Set = None,
    advanced: Advanced = None,
    rows: Rows = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job would train on: rows with their trained tokens marked, counts, and what is wrong.

    Works on this installation's storage, needs no front door, and leaves the tokens in the cache for the job. Exits
    with 2 where a job on these rows would be refused.
    """
    from tunesmith.jobs.audit_report import AuditReport
    from tunesmith.jobs.flavors import load_flavors

    # Where a job runs and what it makes does not matter here, but an order says it.
    order: dict[str, Any] = {"flavor": next(iter(load_flavors())), "output_model": "audited"}
    order |= {"model": model, "dataset": dataset}
    if training_type is not None:
        order["training_type"] = training_type
    order = with_flags(order, {}, hyperparameters=set_ or [], advanced=advanced or [])
    report = AuditReport.model_validate(_run(order, rows))
    if as_json:
        echo_json(report.model_dump_json(indent=2))
    else:
        _show(report)
    if report.refusal is not None:
        raise typer.Exit(REFUSED)


def show_audit(job_id: JobId, as_json: AsJson = False) -> None:
    """What a job trains, as it was found before its training."""
    with open_client() as client:
        report = client.audit(job_id)
    if as_json:
        echo_json(report.model_dump_json(indent=2))
    else:
        _show(report)


def _run(order: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """Audit in a process of its own: tokenizers are no part of the command line."""
    settings = read_settings()
    command = [
        settings.python,
        "-m",
        "trainers.text_job.audit_order",
        *(["--rows", str(rows)] if rows is not None else []),
    ]
    with messages().status("reading, tokenising, comparing"):
        done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UnavailableError(f"the audit ended with exit code {done.returncode}: {last}") from None
    if "error" in answer:
        raise _error(answer["error"])
    return answer


def _error(found: dict[str, Any]) -> TunesmithError:
    error = TunesmithError(found["message"], fields=found["fields"], hint=found["hint"], code=found["code"])
    error.status = found["status"]
    return error


def _show(report: AuditReport) -> None:
    from rich.text import Text

    console = output()
    console.print(_counts(report))
    console.print(Text("\nlength in tokens", style="bold"))
    console.print(_histogram(report))
    for row in report.rows:
        console.print(Text(f"\nrow {row.row + 1}, {row.tokens} tokens, ", style="bold").append("trained", _TRAINED))
        console.print(_row(row), soft_wrap=True)
    console.print()
    for finding in report.findings:
        style = "red" if finding.level == "refused" else "yellow"
        console.print(Text(shown(f"{finding.level}: {finding.message}"), style=style), soft_wrap=True)
        if finding.hint:
            console.print(f"  hint: {shown(finding.hint)}", soft_wrap=True)
    if report.refusal is None:
        console.print(Text(shown(f"{report.dataset} can be trained on with {report.model}"), style="green"))


def _counts(report: AuditReport) -> Table:
    counts = report.counts
    share = counts.trained_tokens / counts.tokens if counts.tokens else 0.0
    return rendering.pairs(
        [
            ("dataset", report.dataset),
            ("model", report.model),
            ("rows", f"{counts.rows:,} of {counts.read:,} read; {counts.skipped:,} without prompt or response"),
            ("tokens", f"{counts.tokens:,}, {share:.0%} of them trained; the longest row has {counts.longest:,}"),
            ("cut", f"{counts.truncated:,} rows, {counts.answer_cut:,} of them in their answer"),
            ("end of turn", f"trained in {counts.ended:,} rows: {' '.join(report.ends)}"),
            ("no trained token", f"{counts.untrained:,} rows"),
            ("compared", f"{report.checked:,} rows, {report.off:,} of them off"),
        ]
    )


def _histogram(report: AuditReport) -> Table:
    lengths = report.counts.lengths
    most = max(lengths.values(), default=1)
    return rendering.pairs(
        (f"{bound // 2 + 1:,} to {bound:,}", f"{'█' * max(1, _BAR * rows // most)} {rows:,}")
        for bound, rows in sorted(lengths.items())
    )


def _row(row: AuditedRow) -> Text:
    """A row with its trained parts in colour and in brackets."""
    from rich.text import Text

    line = Text()
    for text, trained in row.pieces:
        text = shown(text, lines=True)
        line.append(f"⟦{text}⟧" if trained else text, _TRAINED if trained else _CONTEXT)
    return line
