"""Processes of a test, forked from one that has imported the recipe already: none of them imports it again."""

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainers.recipe.training_loop", "deepspeed"])


def run_on(world_size: int, work: Callable[..., None], *given: Any) -> None:
    """`work(rank, *given)` on so many processes, to their end; fails where one fails."""
    torch.multiprocessing.start_processes(work, given, world_size, start_method="forkserver")
