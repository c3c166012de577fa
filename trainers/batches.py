"""Which rows a step takes: a pure function of lengths and seed, the same for every number of workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WINDOW = 32
"""Global batches whose rows are sorted together by length."""


class BatchPlan:
    """Rows by step. Steps are numbered from 1; every epoch goes through all rows once."""

    def __init__(self, lengths: npt.ArrayLike, *, batch_rows: int, passes: int, world_size: int, seed: int) -> None:
        """`lengths` are the tokens of every row; a worker's step is `passes` forward passes of `batch_rows` rows."""
        self._lengths = np.asarray(lengths, np.int32)
        self._batch_rows = batch_rows
        self._world_size = world_size
        self._seed = seed
        self.global_rows = batch_rows * passes * world_size
        self.steps_per_epoch = -(-len(self._lengths) // self.global_rows)
        self._epoch_number = -1
        self._order = np.empty(0, np.int32)
        self._places = np.empty(0, np.int64)

    def rows(self, step: int) -> list[int]:
        """Row numbers of the whole global batch of `step`, longest first."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch_number:
            self._epoch_number = epoch
            self._order, self._places = self._epoch(epoch)
        at = int(self._places[place]) * self.global_rows
        found: list[int] = self._order[at : at + self.global_rows].tolist()
        return found

    def share(self, step: int, rank: int) -> list[list[int]]:
        """The forward passes of one worker: row numbers of each, rows of like length together.

        A pass may be empty at the end of the data.
        """
        rows = self.rows(step)
        passes = [rows[at : at + self._batch_rows] for at in range(0, self.global_rows, self._batch_rows)]
        return passes[rank :: self._world_size]

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """All rows of an epoch, shuffled and in windows sorted by length; and the order in which their batches come.

        Four bytes a row, besides those of the lengths.
        """
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(np.arange(len(self._lengths), dtype=np.int32))
        size = self.global_rows * WINDOW
        for at in range(0, len(order), size):
            window = order[at : at + size]
            order[at : at + size] = window[np.lexsort((window, -self._lengths[window]))]
        return order, random.permutation(self.steps_per_epoch)
