"""The rows of one forward pass as tensors: packed, end to end without padding, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainers.text.shards import TokenizedRows


@dataclass(frozen=True)
class Pass:
    """The rows of a forward pass, and what is trained of them."""

    ids: torch.Tensor
    """Token ids, int64: [1, tokens] where rows are packed, [rows, longest] where they are padded at the right."""
    positions: torch.Tensor
    """Each token's place in its row, int64 [*, tokens]."""
    offsets: torch.Tensor | None
    """Where each packed row begins, and where the last ends: int32 [rows + 1]; None where rows are padded.

    Before the first one stand the tokens that all of them begin with, once; each row goes on from there.
    """
    longest: int
    """Tokens of the longest row."""
    places: torch.Tensor
    """Places in the flattened ids whose row's next token is trained, int64 [trained]; a shared one for every row."""
    targets: torch.Tensor
    """Those next tokens, int64 [trained]."""

    @property
    def tokens(self) -> int:
        """The number of tokens that the pass computes, padding included."""
        return self.ids.numel()


def pack(rows: TokenizedRows, share: Sequence[int], device: torch.device) -> Pass:
    """Put the rows end to end."""
    return pack_tokens([rows.ids(row) for row in share], [rows.trained(row) for row in share], device)


def pack_tokens(ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], device: torch.device) -> Pass:
    """Put rows, given by their tokens, end to end."""
    return _made(ids, trained, device, padded=False, shared=shared_beginning(ids, device))


def pad(rows: TokenizedRows, share: Sequence[int], device: torch.device) -> Pass:
    """Put the rows side by side, padded at the right."""
    return _made([rows.ids(row) for row in share], [rows.trained(row) for row in share], device, padded=True)


def one_row(tokens: int, like: Pass) -> Pass:
    """One row of `tokens` tokens, all of them trained. It is packed where `like` is packed."""
    ids = np.arange(tokens) % 2
    return _made([ids], [np.ones(tokens, bool)], like.ids.device, padded=like.offsets is None)


def shares_beginnings(device: torch.device) -> bool:
    """Whether the tokens that packed rows begin with are computed once. Accelerators need a row's keys contiguous."""
    return device.type == "cpu"


def shared_beginning(ids: Sequence[np.ndarray], device: torch.device) -> int:
    """How many tokens all of these rows begin with, as rows of one template do; a pass on the device has them once.

    0 for a single row; at least one token of each row is left.
    """
    if len(ids) == 1 or not shares_beginnings(device):
        return 0
    most = min(map(len, ids)) - 1
    beginnings = np.stack([row[:most] for row in ids])
    unlike = np.flatnonzero((beginnings != beginnings[0]).any(axis=0))
    return int(unlike[0]) if len(unlike) else most


def _made(
    ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], device: torch.device, *, padded: bool, shared: int = 0
) -> Pass:
    lengths = np.array([len(row) for row in ids])
    longest, offsets = int(lengths.max()), shared + np.concatenate(([0], np.cumsum(lengths - shared)))
    width = longest if padded else int(offsets[-1])
    starts = [longest * number for number in range(len(ids))] if padded else offsets[:-1].tolist()
    size = longest * len(ids) if padded else width
    flat = np.zeros(size, np.int64)
    flat[:shared] = ids[0][:shared]
    # They go on through the padding: where they begin again, transformers sees another row and makes a mask.
    positions = np.arange(size) % longest
    places, targets = [], []
    for start, row, is_trained in zip(starts, ids, trained, strict=True):
        flat[start : start + len(row) - shared] = row[shared:]
        if not padded:
            positions[start : start + len(row) - shared] = np.arange(shared, len(row))
        # Nothing stands before a row's first token that could foretell it.
        before = np.flatnonzero(is_trained[1:])
        places.append(np.where(before < shared, before, start - shared + before))
        targets.append(row[before + 1])

    def to(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        # From memory that may be paged out, the copy would wait for the device.
        return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)

    return Pass(
        ids=to(flat).view(-1, width),
        positions=to(positions).view(-1, width),
        offsets=None if padded else to(offsets.astype(np.int32)),
        longest=longest,
        places=to(np.concatenate(places)),
        targets=to(np.concatenate(targets).astype(np.int64)),
    )
