"""The rows of a pass as tensors: every token in its place, what rows begin with once, every trained token wanted."""

import numpy as np
import pytest
import torch

from trainers.recipe.collate import Pass, pack_tokens, shared_beginning

CPU = torch.device("cpu")
Row = tuple[list[int], list[int]]
"""Token ids, and which of them are trained."""


def packed(*rows: Row) -> Pass:
    return pack_tokens([np.array(ids) for ids, _ in rows], [np.array(trained, bool) for _, trained in rows], CPU)


def wanted(made: Pass) -> list[tuple[int, int]]:
    """Token at each place, and the one that is to follow it."""
    return list(zip(made.ids.flatten()[made.places].tolist(), made.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3, 4]], 0),
        ([[1, 2, 3, 4], [1, 2, 9]], 2),
        ([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1], [1, 2]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
)
def test_what_rows_begin_with(rows: list[list[int]], shared: int) -> None:
    assert shared_beginning([np.array(row) for row in rows], CPU) == shared


def test_what_rows_begin_with_is_there_once() -> None:
    made = packed(([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 5, 6, 7], [0, 0, 1, 0, 1]))
    assert made.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert made.offsets is not None and made.offsets.tolist() == [2, 4, 7]
    assert (made.longest, made.tokens) == (5, 7)
    assert wanted(made) == [(3, 4), (2, 5), (6, 7)]


def test_a_trained_token_that_rows_share_counts_for_each() -> None:
    made = packed(([1, 2, 3], [1, 1, 1]), ([1, 2, 4], [1, 1, 0]), ([1, 2, 5, 6], [1, 0, 1, 1]))
    assert made.offsets is not None and made.offsets.tolist() == [2, 3, 4, 6]
    assert wanted(made) == [(1, 2), (2, 3), (1, 2), (2, 5), (5, 6)]
