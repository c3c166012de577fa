"""A job as it runs, for people: a bar with step, loss, tokens/s and time left on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from tunesmith.api.client import Client, read_on
from tunesmith.cli.terminal import shown
from tunesmith.clock import seconds
from tunesmith.jobs.states import FINAL

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.api.views import EventView, JobView
    from tunesmith.jobs.attempts import MetricLine

_STYLES = {"completed": "bold green", "failed": "bold red", "stopped": "bold yellow"}


@dataclass
class Course:
    """How far a training run has come, by its events and metrics."""

    cards: int = 1
    total_steps: int | None = None
    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    _since: tuple[int, float] | None = None
    """Step and time from which the pace is counted: the first report after a start."""
    _latest: MetricLine | None = None

    def adopt(self, event: EventView) -> None:
        data = event.data
        if "first_step" in data:  # training starts, perhaps again
            self.total_steps, self.step, self._since = data["total_steps"], data["first_step"] - 1, None

    def add(self, line: MetricLine) -> None:
        if line.rank is not None:
            return
        if line.name == "loss":
            before = self._latest
            again = before is not None and (line.attempt != before.attempt or line.step <= before.step)
            if self._since is None or again:
                self._since = line.step, seconds(line.time)
            self.step, self.loss, self._latest = line.step, line.value, line
        elif line.name == "eval_loss":
            self.eval_loss = line.value
        elif line.name == "tokens_per_s_per_card":
            self.tokens_per_s = line.value * self.cards

    @property
    def left_s(self) -> float | None:
        """Time to the last step at the pace so far; None before the second report."""
        if self.total_steps is None or self._since is None or self._latest is None:
            return None
        first_step, start = self._since
        done = self._latest.step - first_step
        if done <= 0:
            return None
        return max(0, self.total_steps - self.step) * (seconds(self._latest.time) - start) / done

    def figures(self) -> str:
        parts = [
            None if self.loss is None else f"loss {self.loss:.4f}",
            None if self.eval_loss is None else f"held-out loss {self.eval_loss:.4f}",
            None if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s",
            None if self.left_s is None else f"ETA {_duration(self.left_s)}",
        ]
        return "  ".join(part for part in parts if part)


def show_progress(client: Client, job_id: str, console: Console, *, poll_s: float = 0.5) -> JobView:
    """Show a job on `console` until it is final; the job as it ended."""
    job = client.job(job_id)
    course = Course(cards=job.job.get("cards", 1))
    after_event: str | None = None
    after_metric: str | None = None
    hint: str | None = None
    with _Bar(console, job) if console.is_terminal else _Lines(console, job) as display:
        while True:
            # The state first: what the job wrote before it was final is among what is read then.
            job = client.job(job_id)
            events, after_event = read_on(lambda place: client.events(job_id, after=place), after_event)
            metrics, after_metric = read_on(lambda place: client.metrics(job_id, after=place), after_metric)
            for event in events:
                course.adopt(event)
                display.event(event)
                hint = _hint(event) or hint
            for line in metrics:
                course.add(line)
            display.show(job, course)
            if job.state in FINAL:
                break
            time.sleep(poll_s)
    console.print(_outcome(job, hint), soft_wrap=True)
    return job


def event_text(event: EventView) -> Text:
    """One event in one line."""
    what = " ".join(part for part in (event.state, event.phase and f"[{event.phase}]", event.reason) if part)
    text = Text().append(f"{shown(event.time[11:19])}  ", style="dim")
    text.append(shown(what), style=_STYLES.get(event.state or "", ""))
    if event.message:
        text.append(f"{': ' if what else ''}{shown(event.message)}")
    elif event.data:
        text.append("  " + shown(", ".join(f"{name} {value}" for name, value in event.data.items())))
    return text


class _Display(ABC):
    """Where the course of one job is shown. A context manager."""

    def __init__(self, console: Console, job: JobView) -> None:
        self._console = console

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def event(self, event: EventView) -> None:
        self._console.print(event_text(event), soft_wrap=True)

    @abstractmethod
    def show(self, job: JobView, course: Course) -> None: ...


class _Bar(_Display):
    """A live bar below the events."""

    def __init__(self, console: Console, job: JobView) -> None:
        super().__init__(console, job)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(_where(job), total=None, figures="")

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, job: JobView, course: Course) -> None:
        self._progress.update(
            self._task,
            description=_where(job),
            total=course.total_steps,
            completed=course.step,
            figures=course.figures(),
        )


class _Lines(_Display):
    """A line when something changed, but only every few seconds."""

    def __init__(
        self, console: Console, job: JobView, *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, job)
        self._every_s = every_s
        self._clock = clock
        self._shown: str | None = None
        self._shown_at = float("-inf")

    def show(self, job: JobView, course: Course) -> None:
        if course.total_steps is None and course.step == 0:
            return  # until it trains, its events say all there is
        # How many steps there will be, a custom model's program does not say.
        total = "" if course.total_steps is None else f"/{course.total_steps}"
        line = f"step {course.step}{total}  {course.figures()}"
        due = self._clock() >= self._shown_at + self._every_s or job.state in FINAL
        if line != self._shown and due:
            self._console.print(line, soft_wrap=True)
            self._shown, self._shown_at = line, self._clock()


def _where(job: JobView) -> str:
    return shown(f"{job.name} {job.phase or job.state}")


def _outcome(job: JobView, hint: str | None) -> Text:
    text = Text().append(shown(f"{job.id} {job.state}"), style=_STYLES.get(job.state, ""))
    if job.state == "completed":
        return text.append(shown(f": {job.output_kind} {job.output}"))
    if job.reason or job.message:
        text.append(f": {shown(': '.join(part for part in (job.reason, job.message) if part))}")
    return text.append(f"\n  hint: {shown(hint)}") if hint else text


def _hint(event: EventView) -> str | None:
    """What a failed job's error says to do."""
    error = event.data.get("error")
    hint = error.get("hint") if isinstance(error, dict) else None
    return hint if isinstance(hint, str) else None


def _duration(duration_s: float) -> str:
    minutes, rest = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
