"""A custom job from the driver's side: its workers as a gang of Ray tasks, and the new model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainers.attempt.cluster_work import connect
from trainers.attempt.context import Attempt
from trainers.attempt.publication import publish
from trainers.attempt.report_writer import ReportWriter, report_writer
from trainers.attempt.stop_watch import StoppedError, StopWatch, stopped
from trainers.programs.program_output import drop_output, keep_output, publish_output
from trainers.programs.program_task import ProgramTask
from trainers.programs.program_worker import Said, free_port, run_program
from tunesmith.assets import catalog, image_references
from tunesmith.assets.catalog import Description
from tunesmith.clock import utc_text
from tunesmith.jobs.attempts import Result
from tunesmith.jobs.spec import CustomJob
from tunesmith.visible_text import visible

END_S = 30.0
"""How long the other workers have to end after one has failed, in seconds, before Ray kills them."""
SHOWN = 10
"""How many names an event lists."""

logger = logging.getLogger(__name__)


def run_custom(attempt: Attempt, job: CustomJob) -> Result:
    """Run the model's own program on all workers, publish what it leaves, and say how it went."""
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group, remove_placement_group

    connect()
    if image_references.RESOURCE in job.resources:
        image_references.check_cluster(ray.cluster_resources(), model=job.model)
    group = placement_group([dict(job.resources) for _ in range(job.cards)], strategy="PACK")
    try:
        _wait_for(group, attempt.stop)
        return _Gang(attempt, job, group).run()
    except StoppedError as stop:
        return stopped(stop.args[0], " before its first step")
    except RayError as error:
        if type(error).__name__.startswith("RayTaskError"):
            raise
        # A worker, or its node, is gone: the next attempt goes on from the output that was kept.
        message = f"a worker was lost: {str(error).strip().splitlines()[0][:300]}"
        return Result(outcome="lost", reason="worker_lost", message=message, time=utc_text())
    finally:
        remove_placement_group(group)


def _wait_for(group: Any, stop: StopWatch) -> None:
    """Wait until the gang has its resources; StoppedError where the job is to stop before that."""
    import ray

    ready = group.ready()
    while not ray.wait([ready], timeout=1.0)[0]:
        stop.check()


class _Gang:
    """All workers of an attempt, each on its bundle of the placement group."""

    def __init__(self, attempt: Attempt, job: CustomJob, group: Any) -> None:
        self._attempt, self._job, self._group = attempt, job, group
        self._workers = self._make_workers()

    def run(self) -> Result:
        attempt = self._attempt
        with report_writer(attempt) as reports:
            results = self._follow(reports)
        failed = next((result for result in results if result.outcome == "failed"), None)
        halted = next((result for result in results if result.outcome == "stopped"), None)
        if failed is None and halted is None:
            return self._publish(results[0])
        attempt.events.write(phase="save")
        kept = self._on_bundle(0, keep_output)(self._workers[0])
        if kept:
            attempt.events.write(f"{len(kept)} files of its output are kept with the job", kept_files=len(kept))
        return failed or halted or results[0]

    def _follow(self, reports: ReportWriter) -> list[Result]:
        """Follow what the workers say until all have ended; their results, the first failure before all others."""
        import ray

        running = {}
        for worker in self._workers:
            task = ray.remote(max_retries=0, num_returns="streaming")(run_program)
            stream = task.options(
                **_resources(self._job), scheduling_strategy=self._bundle(worker.rank)
            ).remote(worker)  # fmt: skip
            running[stream] = worker.rank
        results: list[Result] = []
        deadline: float | None = None
        while running:
            ready, _ = ray.wait(list(running), timeout=1.0)
            for stream in ready:
                try:
                    said: Said = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    continue
                except ray.exceptions.TaskCancelledError:
                    del running[stream]
                    continue
                rank = running[stream]
                for report in said.reports:
                    reports.write(report, rank)
                for message, data in said.events:
                    self._attempt.events.write(message, **data)
                if said.result is not None:
                    results.append(said.result)
                    if said.result.outcome == "failed" and deadline is None:
                        deadline = time.monotonic() + END_S
                        for other in running:
                            if other is not stream:
                                ray.cancel(other)
            if deadline is not None and time.monotonic() > deadline:
                break
        return results

    def _publish(self, result: Result) -> Result:
        attempt, job = self._attempt, self._job
        attempt.events.write(phase="publish")
        attempt.events.flush()
        made = self._on_bundle(0, publish_output)(self._workers[0])
        for paths, why in (
            (made.overridden, "these names belong to the platform and to the base model's training"),
            (made.left_out, "links, what is no file, or names that cannot be stored"),
        ):
            if paths:
                attempt.events.write(f"not taken into the model: {_listed(paths)} ({why})")
        base = catalog.get_manifest(attempt.storage, "model", job.model)
        about = Description(
            task_type=base.task_type,
            framework=base.framework,
            license=base.license,
            base=job.model,
            dataset=job.dataset,
            gallery=base.gallery,
            language_model=made.language_model,
        )
        publish(attempt, made.files, about)
        # Only now: an attempt that is lost before the manifest leaves the output to the next one.
        self._on_bundle(0, drop_output)(self._workers[0])
        message = f"{job.output_model}: {len(made.files.files)} files"
        return Result(outcome="completed", message=message, time=utc_text(), summary=result.summary)

    def _make_workers(self) -> list[ProgramTask]:
        import ray
        from ray.util import placement_group_table

        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        port = self._on_bundle(0, free_port)() if self._job.cards > 1 else 0
        workers, on_node = [], dict.fromkeys(addresses, 0)
        for rank in range(self._job.cards):
            node = nodes[rank]
            workers.append(
                ProgramTask(
                    job=self._job,
                    attempt=self._attempt.number,
                    storage_url=self._attempt.storage.url,
                    deadline=self._attempt.stop.deadline,
                    rank=rank,
                    local_rank=on_node[node],
                    master_addr=addresses[nodes[0]],
                    master_port=port,
                    alone_on_node=len(set(nodes.values())) == 1,
                )
            )
            on_node[node] += 1
        return workers

    def _on_bundle(self, rank: int, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as a function that runs on the node of that worker, in a Ray task without resources."""
        import ray

        task = ray.remote(max_retries=0, num_cpus=0)(work).options(scheduling_strategy=self._bundle(rank))
        return lambda *arguments: ray.get(task.remote(*arguments))

    def _bundle(self, rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)


def _listed(paths: Sequence[str]) -> str:
    """Some of the names that a program has chosen, and how many there are besides."""
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(visible(path, limit=200) for path in paths[:SHOWN]) + more


def _resources(job: CustomJob) -> dict[str, Any]:
    """The resources of one worker, as options of a Ray task."""
    others = {name: amount for name, amount in job.resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": job.resources.get("CPU", 0), "num_gpus": job.resources.get("GPU", 0), "resources": others}
