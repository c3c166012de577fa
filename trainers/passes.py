"""The rows of one forward pass as tensors: packed, end to end without padding, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trainers.shards import TokenizedRows


@dataclass(frozen=True)
class Pass:
    """Rows on their way through the model, and what is wanted of them."""

    ids: torch.Tensor
    """Token ids, int64: [1, tokens] where rows are packed, [rows, longest] where they are padded at the right."""
    positions: torch.Tensor
    """Each token's place in its row, int64 [*, tokens]."""
    offsets: torch.Tensor | None
    """Where each packed row begins, and where the last ends: int32 [rows + 1]; None where rows are padded."""
    longest: int
    """Tokens of the longest row."""
    places: torch.Tensor
    """Places in the flattened ids whose next token is trained, int64 [trained]."""
    targets: torch.Tensor
    """Those next tokens, int64 [trained]."""

    @property
    def tokens(self) -> int:
        """Those that the pass computes, padding included."""
        return self.ids.numel()


def pack(rows: TokenizedRows, share: Sequence[int], device: torch.device) -> Pass:
    """The rows end to end."""
    return _made([rows.ids(row) for row in share], [rows.trained(row) for row in share], device, padded=False)


def pad(rows: TokenizedRows, share: Sequence[int], device: torch.device) -> Pass:
    """The rows side by side."""
    return _made([rows.ids(row) for row in share], [rows.trained(row) for row in share], device, padded=True)


def one_row(tokens: int, like: Pass) -> Pass:
    """One row of so many tokens, all of them trained; packed where `like` is."""
    ids = np.arange(tokens) % 2
    return _made([ids], [np.ones(tokens, bool)], like.ids.device, padded=like.offsets is None)


def _made(ids: list[np.ndarray], trained: list[np.ndarray], device: torch.device, *, padded: bool) -> Pass:
    lengths = [len(row) for row in ids]
    longest, offsets = max(lengths), np.concatenate(([0], np.cumsum(lengths)))
    width = longest if padded else int(offsets[-1])
    starts = [longest * number for number in range(len(ids))] if padded else offsets[:-1].tolist()
    size = longest * len(ids) if padded else width
    flat, wanted = np.zeros(size, np.int64), np.zeros(size + 1, bool)
    # They go on through the padding: where they begin again, transformers sees another row and makes a mask.
    positions = np.arange(size) % longest if padded else np.zeros(size, np.int64)
    for start, row, is_trained in zip(starts, ids, trained, strict=True):
        flat[start : start + len(row)] = row
        positions[start : start + len(row)] = np.arange(len(row))
        wanted[start : start + len(row)] = is_trained
        wanted[start] = False  # nothing stands before it that could foretell it
    places = np.flatnonzero(wanted[1:])

    def to(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        # From memory that may be paged out, the copy would wait for the device.
        return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)

    return Pass(
        ids=to(flat).view(-1, width),
        positions=to(positions).view(-1, width),
        offsets=None if padded else to(offsets.astype(np.int32)),
        longest=longest,
        places=to(places),
        targets=to(flat[places + 1]),
    )


def lengths_of(offsets: torch.Tensor) -> list[int]:
    """Tokens of every packed row."""
    return [end - start for start, end in pairwise(offsets.tolist())]
