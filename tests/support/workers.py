"""Processes of a test, forked from one that has imported the recipe already: none of them imports it again.

None outlives the test run: who exits would wait for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch

LIMIT_S = 120.0
"""How long one of them may take."""

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainers.recipe.training_loop", "deepspeed"])


def run_on(world_size: int, work: Callable[..., None], *given: Any) -> None:
    """`work(rank, *given)` on so many processes, to their end; fails where one fails."""
    torch.multiprocessing.start_processes(work, given, world_size, daemon=True, start_method="forkserver")


@contextmanager
def process(work: Callable[..., None], *given: Any) -> Iterator[BaseProcess]:
    """`work(*given)` in a process of its own, which is killed where it has not ended by the end of the context."""
    started = CONTEXT.Process(target=work, args=given, daemon=True)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


def exit_code(work: Callable[..., None], *given: Any) -> int:
    """What `work(*given)` in a process of its own ended with: -9 where it was killed by SIGKILL."""
    with process(work, *given) as started:
        started.join(LIMIT_S)
        assert started.exitcode is not None, f"it did not end within {LIMIT_S:g} s"
        return started.exitcode
