"""Which rows a step takes: a pure function of lengths and seed, the same for every number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class BatchPlan:
    """Rows by step. Steps are numbered from 1; every epoch goes through all rows once, in an order of its own."""

    def __init__(self, lengths: npt.ArrayLike, *, batch_rows: int, passes: int, world_size: int, seed: int) -> None:
        """`lengths` are the tokens of every row; a worker's step is `passes` forward passes of `batch_rows` rows."""
        self._lengths = np.asarray(lengths, np.int32)
        self._batch_rows = batch_rows
        self._passes = passes
        self._world_size = world_size
        self._seed = seed
        self.global_rows = batch_rows * passes * world_size
        self.steps_per_epoch = -(-len(self._lengths) // self.global_rows)
        self._epoch_number = -1
        self._order = np.empty(0, np.int32)

    def rows(self, step: int) -> list[int]:
        """Row numbers of the whole global batch of `step`, longest first."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch_number:
            self._epoch_number = epoch
            random = np.random.default_rng((self._seed, epoch))
            self._order = random.permutation(np.arange(len(self._lengths), dtype=np.int32))
        rows = self._order[place * self.global_rows : (place + 1) * self.global_rows]
        found: list[int] = rows[np.lexsort((rows, -self._lengths[rows]))].tolist()
        return found

    def padded(self, step: int, rank: int) -> list[list[int]]:
        """The forward passes of one worker where rows are padded: rows of similar length come together.

        A pass may be empty at the end of the data.
        """
        rows = self.rows(step)
        passes = [rows[at : at + self._batch_rows] for at in range(0, self.global_rows, self._batch_rows)]
        return passes[rank :: self._world_size]

    def packed(self, step: int, rank: int, tokens: int | None, shared: int = 0) -> list[list[int]]:
        """The forward passes of one worker where rows are packed: workers and passes get similar numbers of tokens.

        A pass has about `tokens` at most, even if that takes more passes than were asked for, the same number for each
        worker.
        The `shared` tokens that all rows of the step begin with, and that each pass has once, are not counted.
        """
        shares = self._dealt(self.rows(step), self._world_size, shared)
        most = max(int((self._lengths[share] - shared).sum()) for share in shares)
        return self._dealt(shares[rank], max(self._passes, 0 if tokens is None else -(-most // tokens)), shared)

    def _dealt(self, rows: Sequence[int], hands: int, shared: int) -> list[list[int]]:
        """Deal the rows out, longest first: each to the hand with the fewest tokens, the shared ones not counted."""
        dealt: list[list[int]] = [[] for _ in range(hands)]
        held = [0] * hands
        for row in rows:
            hand = held.index(min(held))
            dealt[hand].append(row)
            held[hand] += int(self._lengths[row]) - shared
        return dealt
