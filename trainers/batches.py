"""Which rows a step takes: a pure function of lengths and seed, the same for every number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 32
"""Global batches whose rows are sorted together by length."""


class BatchPlan:
    """Rows by step. Steps are numbered from 1; every epoch goes through all rows once."""

    def __init__(self, lengths: Sequence[int], *, batch_rows: int, passes: int, world_size: int, seed: int) -> None:
        """`lengths` are the tokens of every row; a worker's step is `passes` forward passes of `batch_rows` rows."""
        self._lengths = lengths
        self._batch_rows = batch_rows
        self._world_size = world_size
        self._seed = seed
        self.global_rows = batch_rows * passes * world_size
        self.steps_per_epoch = -(-len(lengths) // self.global_rows)
        self._epoch_number = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """Row numbers of the whole global batch of `step`, longest first."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch_number:
            self._epoch_number, self._batches = epoch, self._epoch(epoch)
        return self._batches[place]

    def share(self, step: int, rank: int) -> list[list[int]]:
        """The forward passes of one worker: row numbers of each, rows of like length together.

        A pass may be empty at the end of the data.
        """
        rows = self.rows(step)
        passes = [rows[at : at + self._batch_rows] for at in range(0, self.global_rows, self._batch_rows)]
        return passes[rank :: self._world_size]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """All global batches of an epoch: shuffled, sorted by length in windows, and the batches shuffled again."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._lengths)).tolist()
        size = self.global_rows * WINDOW
        batches = []
        for at in range(0, len(order), size):
            window = sorted(order[at : at + size], key=lambda row: (-self._lengths[row], row))
            batches += [window[cut : cut + self.global_rows] for cut in range(0, len(window), self.global_rows)]
        return [batches[place] for place in random.permutation(len(batches))]
