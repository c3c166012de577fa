"""A driver's heavy work, done as a Ray task that takes its place among the cluster's resources.

A driver itself holds none, so what it computes would be done for nothing on the node that it happens to be on. While
the task waits for room, and while it works, the driver goes on listening.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tunesmith.errors import OutOfMemoryError, TunesmithError, UnavailableError
from tunesmith.jobs.attempts import EventWriter

LOOK_S = 1.0
"""Between two calls of what listens."""
SAY_S = 5.0
"""A task that has waited so long for room says so."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """What the work takes of the cluster."""

    cpus: int = 1
    memory_bytes: int = 0
    """An estimate. What no node has in all is asked for as far as there is one that has."""
    on_this_node: bool = False
    """Whether the files of the work lie on this node alone."""


@dataclass(frozen=True)
class _Begun:
    """The work has its place."""


@dataclass(frozen=True)
class _Told:
    item: Any


@dataclass(frozen=True)
class _Ended(Generic[T]):
    result: T | None = None
    error: TunesmithError | None = None


class _GivenUpError(Exception):
    """Nobody wants the work's result any more."""


class Tell:
    """What work is given: it takes what the work tells, and ends the work that nobody wants any more."""

    def __init__(self, told: queue.SimpleQueue[Any]) -> None:
        self._told = told
        self._is_given_up = threading.Event()

    def __call__(self, item: Any) -> None:
        """Tell something on the way."""
        self.check()
        self._told.put(_Told(item))

    def check(self) -> None:
        """To be called now and then by work that tells nothing for long: raises where it is to end."""
        if self._is_given_up.is_set():
            raise _GivenUpError

    def give_up(self) -> None:
        self._is_given_up.set()


def run_on_cluster(
    work: Callable[[Tell], T],
    *,
    name: str,
    needs: Needs,
    events: EventWriter,
    listen: Callable[[], None],
    told: Callable[[Any], None] = lambda item: None,
) -> T:
    """What `work(tell)` returns, done on the cluster; `told` takes what it tells on its way.

    `listen` is called all the while and may raise what ends it: then the task is killed. Raises what the work raised,
    and UnavailableError where the process that did it was lost. A driver outside of a cluster does the work itself.
    """
    stream = (
        _on_cluster(work, name=name, needs=needs, events=events, listen=listen)
        if _is_on_cluster()
        else _here(work, listen)
    )
    with closing(stream):
        for item in stream:
            if isinstance(item, _Told):
                told(item.item)
            elif isinstance(item, _Ended):
                if item.error is not None:
                    raise item.error
                result: T = item.result  # type: ignore[assignment]
                return result
    raise UnavailableError(f"{name} ended without a result")


def connect() -> None:
    """Connect this process to its Ray, where it is not connected yet."""
    import ray

    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)


def _is_on_cluster() -> bool:
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _here(work: Callable[[Tell], T], listen: Callable[[], None]) -> Generator[Any, None, None]:
    with closing(_doing(work, wait_s=LOOK_S)) as items:
        for item in items:
            listen()
            yield item


def _on_cluster(
    work: Callable[[Tell], T],
    *,
    name: str,
    needs: Needs,
    events: EventWriter,
    listen: Callable[[], None],
) -> Generator[Any, None, None]:
    import ray
    from ray.exceptions import RayError

    connect()
    task = ray.remote(max_retries=0, num_returns="streaming")(_doing)
    stream = task.options(name=name, **_options(needs)).remote(work)
    asked, begun, has_ended, has_said = time.monotonic(), False, False, False
    try:
        while True:
            listen()
            if not ray.wait([stream], timeout=LOOK_S)[0]:
                if not begun and not has_said and time.monotonic() - asked > SAY_S:
                    has_said = True
                    events.write(f"{name} waits for room on the cluster: {_text(needs)}", waits_for_cpus=needs.cpus)
                    events.flush()
                continue
            item = ray.get(next(stream))
            begun = True
            has_ended = isinstance(item, _Ended)
            yield item
    except StopIteration:
        has_ended = True
    except RayError as error:
        raise _loss(name, error) from error
    finally:
        if not has_ended:
            ray.cancel(stream, force=True)


def _doing(work: Callable[[Tell], T], *, wait_s: float | None = None) -> Generator[Any, None, None]:
    """Do the work in a thread, and yield what it tells and how it ends; with `wait_s`, None as often at least."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    tell = Tell(told)
    unexpected: list[BaseException] = []

    def do() -> None:
        try:
            told.put(_Ended(work(tell)))
        except TunesmithError as error:
            told.put(_Ended(error=error))
        except BaseException as error:  # noqa: BLE001 - the thread's border: it is raised again where it is waited for
            unexpected.append(error)
            told.put(_Ended())

    yield _Begun()
    thread = threading.Thread(target=do, name="work", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = told.get(timeout=wait_s)
            except queue.Empty:
                yield None
                continue
            if unexpected and isinstance(item, _Ended):
                raise unexpected[0]
            yield item
            if isinstance(item, _Ended):
                return
    finally:
        tell.give_up()
        thread.join()


def _options(needs: Needs) -> dict[str, Any]:
    """As Ray's options of a task. Nothing is asked for that no node could ever give."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and (not needs.on_this_node or node["NodeID"] == here)]

    def most(resource: str) -> float:
        return max((float(node["Resources"].get(resource, 0)) for node in nodes), default=0.0)

    options: dict[str, Any] = {
        "num_cpus": min(needs.cpus, math.floor(most("CPU"))),
        "memory": min(needs.memory_bytes, int(most("memory"))),
    }
    if needs.on_this_node:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    return options


def _loss(name: str, error: BaseException) -> BaseException:
    """What became of the work, from Ray's error."""
    from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(error, RayOutOfMemoryError):
        return OutOfMemoryError(f"{name} ran out of memory on its node")
    return UnavailableError(f"the process that did {name} was lost: {str(error).strip().splitlines()[0][:300]}")


def _text(needs: Needs) -> str:
    memory = f" and {needs.memory_bytes / (1 << 30):.1f} GiB of memory" if needs.memory_bytes else ""
    return f"{needs.cpus} CPU{memory}"
