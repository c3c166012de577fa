"""Faults of other encoders, planted where ours does it right."""

from typing import Any

from tunesmith.text.chat_templates import Piece
from tunesmith.text.tokenization import Part


def right_cut(parts: list[Part], limit: int, head: int = 0) -> list[Part]:
    """Cuts a row at its end, whatever part of the answer that costs."""
    kept = []
    for ids, trained in parts:
        kept.append((ids[:limit], trained))
        limit -= len(kept[-1][0])
    return kept


def tokenised_whole(text: Any, pieces: list[list[Piece]]) -> list[list[Part]]:
    """As trainers do that tokenise prompt and whole row, and mask as many tokens as the prompt has."""
    found = []
    for row in pieces:
        parts: list[Part] = []
        whole = text._ids("".join(text._control.show(piece.text) for piece in row))
        before, done = "", 0
        for piece in row:
            before += text._control.show(piece.text)
            end = len(text._ids(before))
            parts.append((whole[done:end], piece.trained))
            done = end
        found.append(parts)
    return found
