"""Tables for people, made from the API's answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tunesmith.cli.terminal import shown

if TYPE_CHECKING:
    from tunesmith.api.views import AssetView, JobView
    from tunesmith.assets.gallery import Gallery
    from tunesmith.assets.train_params import Parameter
    from tunesmith.assets.training_types import TrainingTypes
    from tunesmith.hyperparameters.field import Hyperparameter
    from tunesmith.jobs.attempts import MetricLine
    from tunesmith.jobs.flavors import Flavor
    from tunesmith.jobs.spec import TrainJob

STYLES = {"completed": "green", "failed": "red", "stopped": "yellow", "stopping": "yellow", "running": "cyan"}


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of plain text, shown exactly as it is."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(shown(column), no_wrap=number == 0, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(shown(_text(cell))) for cell in row))
    return made


def pairs(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values, a line each; what has no value is left out."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, "", {}, []):
            made.add_row(shown(name), value if isinstance(value, Text) else Text(shown(_text(value), lines=True)))
    return made


def state(name: str) -> Text:
    return Text(shown(name), style=STYLES.get(name, ""))


def jobs(views: Iterable[JobView]) -> Table:
    rows = (
        (job.id, job.name, job.kind, state(job.state), job.phase, job.output, _minute(job.created_at)) for job in views
    )
    return table(("JOB", "NAME", "KIND", "STATE", "PHASE", "MAKES", "CREATED"), rows)


def job(view: JobView, details: Mapping[str, Any]) -> Table:
    spec = view.job
    workers = f"{spec['cards']} × {spec['flavor']}" if view.kind == "train" else None
    return pairs(
        [
            ("job", view.id),
            ("name", view.name),
            ("kind", view.kind),
            ("state", state(view.state)),
            ("phase", view.phase),
            ("reason", view.reason),
            ("message", view.message),
            ("attempt", view.attempt or None),
            ("Ray job", view.submission_id),
            ("makes", f"{view.output_kind} {view.output}"),
            ("model", spec.get("model")),
            ("dataset", spec.get("dataset")),
            ("training type", spec.get("training_type")),
            ("source", spec.get("source")),
            ("workers", workers),
            ("created", view.created_at),
            ("started", view.started_at),
            ("ended", view.ended_at),
            *_changed(spec, details),
        ]
    )


def plan(planned: TrainJob, flavor: Flavor | None, details: Mapping[str, Any]) -> Table:
    """What an order comes to: what it trains on what, every hyperparameter that is not its default, the price.

    `details` are the model's; likewise for `job`.
    """
    price = None if flavor is None else f"{flavor.price_per_hour * planned.cards} an hour"
    limit = None if planned.max_run_time_s is None else f"{planned.max_run_time_s} s"
    changed = _changed(planned.model_dump(), details)
    return pairs(
        [
            ("name", planned.name),
            ("model", planned.model),
            ("dataset", planned.dataset),
            ("training type", f"{planned.training_type}, {planned.method}"),
            ("workers", f"{planned.cards} × {planned.flavor} ({_resources(planned.resources)})"),
            ("at most", limit),
            ("new model", planned.output_model),
            *(changed or [("settings", "all at their defaults")]),
            ("price", price),
        ]
    )


def models(views: Iterable[AssetView]) -> Table:
    rows = (
        (view.ref, view.task_type, view.base, view.dataset, _size(view.size_bytes), _minute(view.created_at))
        for view in views
    )
    return table(("MODEL", "TASK TYPE", "BASE", "DATASET", "SIZE", "CREATED"), rows)


def datasets(views: Iterable[AssetView]) -> Table:
    rows = (
        (view.ref, sum(t.rows for t in view.tables.values()), ", ".join(view.tables), _size(view.size_bytes),
         _minute(view.created_at))
        for view in views
    )  # fmt: skip
    return table(("DATASET", "ROWS", "DATA FILES", "SIZE", "CREATED"), rows)


def asset(view: AssetView) -> Table:
    return pairs(
        [
            (view.kind, view.ref),
            ("task type", view.task_type),
            ("base", view.base),
            ("dataset", view.dataset),
            ("made by", view.job),
            ("created", view.created_at),
            ("size", _size(view.size_bytes)),
            *((f"data in {path}", f"{t.rows} rows: {', '.join(t.columns)}") for path, t in view.tables.items()),
            *((name.replace("_", " "), value) for name, value in view.details.items()),
            *(training(view.training, view.gallery) if view.training is not None else ()),
            ("files", "\n".join(f"{shown(file.path)}  {_size(file.size_bytes)}" for file in view.files)),
        ]
    )


def training(types: TrainingTypes, gallery: Gallery | None) -> list[tuple[str, object]]:
    """How a model may be trained, and what its own training takes."""
    named = [f"{name} (default)" if name == types.default else name for name in types.allowed]
    rows: list[tuple[str, object]] = [("training types", ", ".join(named) or "none"), ("reason", types.reason)]
    if gallery is not None:
        rows += [("image", gallery.image_url), ("problems", "\n".join(map(shown, gallery.problems)))]
        rows += [(f"method {m.name}", "\n".join(map(_parameter, m.hyperparameters)) or "-") for m in gallery.methods]
    return rows


def flavors(rows: Iterable[Flavor]) -> Table:
    columns = ("FLAVOR", "ACCELERATOR", "CPUS", "MEMORY", "REGION", "PRICE OF A CARD")
    return table(
        columns,
        ((f.name, f.accelerator, f.cpus, f"{f.memory_gib} GiB", f.region, f"{f.price_per_hour} an hour") for f in rows),
    )


def hyperparameters(rows: Iterable[Hyperparameter], *, chinese: bool = False) -> Table:
    columns = ("NAME", "TYPE", "DEFAULT", "ALLOWED", "WHAT")
    return table(
        columns,
        ((h.name, h.type.__name__, _value(h.default), _allowed(h), h.help_zh if chinese else h.help) for h in rows),
    )


def metrics(lines: Iterable[MetricLine]) -> Table:
    """A row a step, a column a metric; figures of one rank are named NAME[RANK]. Of a step done twice the newest."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        steps.setdefault(line.step, {})[_metric_name(line)] = line.value
    names = list(dict.fromkeys(name for figures in steps.values() for name in figures))
    rows = ((step, *(_figure(figures.get(name)) for name in names)) for step, figures in sorted(steps.items()))
    return table(("STEP", *names), rows)


def metric_text(line: MetricLine) -> str:
    return shown(f"{line.time}  step {line.step}  {_metric_name(line)} {_figure(line.value)}")


def _metric_name(line: MetricLine) -> str:
    return line.name if line.rank is None else f"{line.name}[{line.rank}]"


def _changed(spec: Mapping[str, Any], details: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The hyperparameters of a resolved spec that differ from the defaults for a model with these details.

    Of a custom job all: the model's own defaults are not looked up.
    """
    from tunesmith.hyperparameters.definitions import SECTIONS, for_model

    found: list[tuple[str, object]] = []
    custom = spec.get("training_type") == "custom"
    if custom:
        found += [(name, _value(value)) for name, value in spec["hyperparameters"].items()]
    for definition in SECTIONS:
        given = {} if custom and definition.section == "hyperparameters" else spec.get(definition.section, {})
        for h in for_model(definition, details):
            if h.name in given and given[h.name] != h.default:
                found.append((h.name, f"{_value(given[h.name])} (default {_value(h.default)})"))
    return found


def _parameter(p: Parameter) -> str:
    facts = [p.type, "required" if p.required else "optional"]
    facts += [] if p.default is None else [f"default {_value(p.default)}"]
    return shown(f"{p.name}  {', '.join(facts)}" + (f": {p.help}" if p.help else ""))


def _allowed(h: Hyperparameter) -> str:
    if not h.allowed:
        return h.bounds
    return " | ".join(map(_value, h.allowed)) + (" (in this version)" if h.supported else "")


def _value(value: object) -> str:
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _resources(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
