"""From rows of text to tokens, with a mask of those that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.errors import DataError

BATCH_ROWS = 512
"""Rows tokenised in one call; batches of text are faster than single ones."""

Piece = tuple[str, bool]
"""Text of a row, and whether its tokens are trained."""


@dataclass(frozen=True)
class TokenizedRows:
    """Rows ready for training: for each its token ids and which of them are trained."""

    ids: Sequence[npt.NDArray[np.int32]]
    trained: Sequence[npt.NDArray[np.bool_]]
    skipped: int
    """Rows without a prompt or a response."""
    truncated: int
    """Rows that lost tokens to `max_seq_length`."""

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    hyperparameters: Mapping[str, Any],
    advanced: Mapping[str, Any],
    training_type: str,
    limit: int | None = None,
) -> TokenizedRows:
    """Tokenise `rows`; at most `limit` are kept. Raises DataError where no row is left.

    `tokenizer` is a fast one of transformers. The response and its end-of-turn token are trained, earlier answers only
    with `train_on_history`. A row that is too long loses the beginning of what stands before its response; a response
    that alone is too long loses its end (see `cut`).
    """
    form = _Form(tokenizer, hyperparameters, train_on_history=bool(advanced["train_on_history"]))
    ids: list[npt.NDArray[np.int32]] = []
    trained: list[npt.NDArray[np.bool_]] = []
    skipped = truncated = 0
    source = enumerate(rows, start=1)
    while (limit is None or len(ids) < limit) and (batch := list(islice(source, BATCH_ROWS))):
        pieces = [form.pieces(row, number, training_type) for number, row in batch]
        skipped += pieces.count([])
        for row_pieces in _encode(tokenizer, [row for row in pieces if row]):
            parts = form.with_special_tokens(row_pieces)
            kept = cut(parts, int(hyperparameters["max_seq_length"]))
            truncated += sum(len(p) for p, _ in kept) < sum(len(p) for p, _ in parts)
            ids.append(np.concatenate([np.asarray(p, np.int32) for p, _ in kept]))
            trained.append(np.concatenate([np.full(len(p), flag) for p, flag in kept]))
    if not ids:
        raise DataError(
            f"no row is left to train on: {skipped} of {skipped} have no prompt or no response",
            fields=["hyperparameters.prompt_field", "hyperparameters.response_field"],
        )
    return TokenizedRows(ids[:limit], trained[:limit], skipped, truncated)


def cut(parts: Sequence[tuple[list[int], bool]], limit: int) -> list[tuple[list[int], bool]]:
    """Shorten a row's parts to `limit` tokens, keeping the answer.

    The last part is the response. What stands before it loses tokens from its beginning, down to a quarter of the
    limit; only then the response loses tokens from its end.
    """
    *before, (response, flag) = parts
    context = sum(len(ids) for ids, _ in before)
    room = max(limit - len(response), min(context, limit // 4))
    drop = max(0, context - room)
    kept = []
    for ids, trained in before:
        gone = min(drop, len(ids))
        drop -= gone
        kept.append((ids[gone:], trained))
    return [*kept, (response[: limit - min(context, room)], flag)]


def prompt_text(row: Mapping[str, Any], tokenizer: Any, hyperparameters: Mapping[str, Any]) -> str:
    """The text that a model is given to answer a row: all that stands before its response."""
    form = _Form(tokenizer, hyperparameters, train_on_history=False)
    response = str(hyperparameters["response_field"])
    pieces = form.pieces({**row, response: "-"}, 0, "text-question-answering")
    return "".join(text for text, _ in pieces[:-1])


class _Form:
    """How the turns of a row become text: by the model's chat template, or by the user's own templates."""

    def __init__(self, tokenizer: Any, hyperparameters: Mapping[str, Any], *, train_on_history: bool) -> None:
        self._tokenizer = tokenizer
        self._h = hyperparameters
        self._train_on_history = train_on_history
        given = hyperparameters["instruction_template"], hyperparameters["response_template"]
        self._chat = given == (None, None) and tokenizer.chat_template is not None
        self._instruction = given[0] or ""
        self._response = given[1] if given[1] is not None else "\n"

    def pieces(self, row: Mapping[str, Any], number: int, training_type: str) -> list[Piece]:
        """The pieces of a row, the response last; none for a row to be skipped. DataError names a wrong cell."""
        prompt = self._text(row, "prompt_field", number)
        response_field = str(self._h["response_field"])
        if training_type == "text-generation" and response_field not in row:
            return [("", False), (prompt, True)] if prompt.strip() else []
        response = self._text(row, "response_field", number)
        if not prompt.strip() or not response.strip():
            return []
        turns = [*self._history(row, number), (prompt, response)]
        return self._chat_pieces(turns) if self._chat else self._template_pieces(turns)

    def with_special_tokens(self, parts: list[tuple[list[int], bool]]) -> list[tuple[list[int], bool]]:
        """Add the beginning-of-text token where the tokenizer wants one and none is there, and end the response."""
        eos = self._tokenizer.eos_token_id
        *before, (response, flag) = parts
        if self._chat:
            # The template's own end of turn is the last special token; what follows it (a newline) is no answer.
            special = set(self._tokenizer.all_special_ids)
            ends = [place for place, token in enumerate(response) if token in special]
            response = response[: ends[-1] + 1] if ends else response
        if eos is not None and (not response or response[-1] not in self._tokenizer.all_special_ids):
            response = [*response, eos]
        first = next((ids[0] for ids, _ in before if ids), None)
        bos = self._tokenizer.bos_token_id
        if not self._chat and getattr(self._tokenizer, "add_bos_token", False) and bos is not None and first != bos:
            before = [([bos], False), *before]
        return [*before, (response, flag)]

    def _chat_pieces(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        messages: list[dict[str, str]] = []
        pieces: list[Piece] = []
        done = ""
        for place, (prompt, response) in enumerate(turns):
            last = place == len(turns) - 1
            messages.append({"role": "user", "content": f"{self._h['prefix']}{prompt}"})
            asked = self._render(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": response})
            answered = self._render(messages, add_generation_prompt=False)
            if (
                not asked.startswith(done)
                or not answered.startswith(asked)
                or response.strip() not in answered[len(asked) :]
            ):
                raise DataError(
                    "the model's chat template changes earlier text when an answer is added, so that the trained part "
                    "cannot be told apart",
                    hint="set instruction_template and response_template",
                    code="template_not_additive",
                )
            pieces += [(asked[len(done) :], False), (answered[len(asked) :], last or self._train_on_history)]
            done = answered
        return pieces

    def _template_pieces(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for place, (prompt, response) in enumerate(turns):
            last = place == len(turns) - 1
            pieces.append((f"{self._h['prefix']}{self._instruction}{prompt}{self._response}", False))
            pieces.append((response, last or self._train_on_history))
        return pieces

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _text(self, row: Mapping[str, Any], parameter: str, number: int) -> str:
        column = str(self._h[parameter])
        value = row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"row {number}: column {column!r} must hold text, got {type(value).__name__}",
                fields=[f"hyperparameters.{parameter}"],
            )
        return value

    def _history(self, row: Mapping[str, Any], number: int) -> list[tuple[str, str]]:
        column = self._h["history_field"]
        turns = row.get(str(column)) if column is not None else None
        if not turns:
            return []
        if isinstance(turns, str):
            import json

            try:
                turns = json.loads(turns)
            except json.JSONDecodeError:
                turns = None
        pairs = isinstance(turns, list) and all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
        )
        if not isinstance(turns, list) or not pairs:
            raise DataError(
                f"row {number}: column {column!r} must hold a list of [question, answer] pairs of text",
                fields=["hyperparameters.history_field"],
            )
        return [(turn[0], turn[1]) for turn in turns]


def _encode(tokenizer: Any, rows: Sequence[Sequence[Piece]]) -> Iterator[list[tuple[list[int], bool]]]:
    """Token ids of every piece; pieces are tokenised apart, so that none merges across the border of the mask."""
    texts = [text for row in rows for text, _ in row]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    for row in rows:
        yield [(next(encoded), trained) for _, trained in row]
