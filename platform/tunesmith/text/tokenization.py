"""From turns to tokens, with a mask of those that are trained.

Contexts and answers are tokenised apart: a prompt has the tokens that the model is given when it answers, and no token
reaches over the border of the mask. Where the tokens of the whole text would do so (`Answer: ` and `Paris` make
` Paris`), the row keeps the prompt's own ones, because the model will see them so. The audit counts such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.errors import DataError
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.text.chat_templates import Piece, Template
from tunesmith.text.formats import Example

Part = tuple[list[int], bool]
"""Token ids of a piece, and whether they are trained."""


@dataclass(frozen=True)
class Encoded:
    """One row, ready for training."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    truncated: bool
    """It lost tokens to `max_seq_length`."""
    answer_cut: bool
    """Its last answer lost its end, and with it the end of turn: the model must not learn to stop there."""
    ended: bool
    """The end of its last answer is trained."""
    spelled_out: bool
    """Its text spells out a control token, taken as plain text."""

    @property
    def targets(self) -> int:
        """Trained tokens that count: the first token of a row is never predicted."""
        return int(self.trained[1:].sum())


class Encoder:
    """Tokenises examples for one model and one job; made once, because it tries the tokenizer and template out.

    `tokenizer` is a fast one of transformers. The answer and its end of turn are trained, earlier answers only with
    `train_on_history`. A row that is too long loses the beginning of what stands before its answer (see `cut`).
    """

    def __init__(self, tokenizer: Any, hyperparameters: EncodingHyperparameters, advanced: EncodingAdvanced) -> None:
        self.template = Template(tokenizer, hyperparameters, train_on_history=history_is_trained(advanced))
        self._text = TextTokens(tokenizer, self.template)
        self.beginning = [] if self.template.chat else self._text.beginning
        """Token ids of the beginning of text; a chat template writes it itself, where there is to be one."""
        self._limit = hyperparameters.max_seq_length
        self._tokenizer = tokenizer

    def encode(self, examples: Sequence[Example], places: Sequence[int | str] | None = None) -> list[Encoded]:
        """Rows in the order of `examples`. DataError names the place of a refused one: its row number, or words.

        DataError (`template_*`) where the model's template cannot be trained with.
        """
        rows = []
        for number, example in enumerate(examples):
            try:
                rows.append(self.template.pieces(example))
            except DataError as error:
                place = places[number] if places is not None else number + 1
                raise _at(place, error) from None
        parts = self._text.encode(rows)
        return [self._row(row, pieces) for row, pieces in zip(parts, rows, strict=True)]

    def prompt_ids(self, example: Example) -> npt.NDArray[np.int32]:
        """The tokens that the model is given to answer `example`: its row's, up to the last answer."""
        [[(ids, _)]] = self._text.encode([[Piece(self.template.prompt(example), False)]])
        return np.asarray([id_ for part, _ in begin([(ids, False)], self.beginning) for id_ in part], np.int32)

    def _row(self, parts: Sequence[Part], pieces: Sequence[Piece]) -> Encoded:
        whole = begin(parts, self.beginning)
        head = 1 if whole[0][0][:1] == [self._tokenizer.bos_token_id] else 0
        kept = cut(whole, self._limit, head=head)
        ids = np.concatenate([np.asarray(ids, np.int32) for ids, _ in kept])
        trained = mask(kept)
        answer_cut = len(kept[-1][0]) < len(whole[-1][0])
        return Encoded(
            ids,
            trained,
            truncated=len(ids) < sum(len(ids) for ids, _ in whole),
            answer_cut=answer_cut,
            ended=bool(trained[-1]) and not answer_cut and int(ids[-1]) in self.template.control.ids,
            spelled_out=any(spelled for piece in pieces for _, spelled in self.template.control.split(piece.text)),
        )


class TextTokens:
    """A tokenizer for pieces of text that follow one another."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self._tokenizer = tokenizer
        self._control = template.control
        self._apart = all(self._ids("\n" + text) == self._ids("\n") + self._ids(text) for text in ("Hello", " Hello"))
        """Whether text has the same tokens after other text as alone. SentencePiece's first space prevents it."""
        self.beginning = self._beginning()
        """What the tokenizer itself puts before a text."""

    def encode(self, rows: Sequence[Sequence[Piece]]) -> list[list[Part]]:
        """The token ids of every piece, as they are after the pieces before it."""
        if not self._apart:
            return [self._one_by_one(row) for row in rows]
        split = [[self._control.split(piece.text) for piece in row] for row in rows]
        found = iter(self._batch([text for row in split for words in row for text, spelled in words if not spelled]))
        parts = []
        for row, words_of in zip(rows, split, strict=True):
            ids_of = [[self._plain(text) if spelled else next(found) for text, spelled in words] for words in words_of]
            parts.append([([*chain.from_iterable(ids)], piece.trained) for piece, ids in zip(row, ids_of, strict=True)])
        return parts

    def _batch(self, texts: list[str]) -> list[list[int]]:
        # Without transformers, which makes more of every text than its ids. The backend keeps settings between calls.
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = False
        backend.no_truncation()
        backend.no_padding()
        return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _one_by_one(self, row: Sequence[Piece]) -> list[Part]:
        before: str | None = ""
        so_far: list[int] = []
        parts: list[Part] = []
        for piece in row:
            ids: list[int] = []
            for text, spelled in self._control.split(piece.text):
                more = self._plain(text) if spelled else self._behind(before, [*so_far, *ids], text)
                before = None if spelled or before is None else before + text
                ids += more
            so_far += ids
            parts.append((ids, piece.trained))
        return parts

    def _behind(self, before: str | None, ids: list[int], text: str) -> list[int]:
        """The tokens of `text` after `before`, whose tokens are `ids`; None where it cannot be tokenised again."""
        if before is not None:
            whole = self._ids(before + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._behind_anchor(text)

    def _behind_anchor(self, text: str, **options: bool) -> list[int]:
        """The tokens of `text` as they are after other text that does not merge with it."""
        for anchor in ("\n", "x", "."):
            ids, whole = self._ids(anchor), self._ids(anchor + text, **options)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._ids(text, **options)

    def _plain(self, text: str) -> list[int]:
        """A control token's words as ordinary tokens."""
        ids = self._behind_anchor(text, split_special_tokens=True)
        if self._control.ids.isdisjoint(ids):
            return ids
        # The tokenizer splits only what is declared special.
        return [*self._behind_anchor(text[:1]), *self._behind_anchor(text[1:])]

    def _ids(self, text: str, **options: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def _beginning(self) -> list[int]:
        alone: list[int] = self._ids("a")
        whole: list[int] = self._tokenizer("a")["input_ids"]
        places = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        return whole[: next(places, 0)]


def history_is_trained(advanced: EncodingAdvanced) -> bool:
    """Whether answers before the last one are trained, which they are only on request."""
    return advanced.train_on_history


def mask(parts: Sequence[Part]) -> npt.NDArray[np.bool_]:
    """What is trained goes by the place of a token, never by its id: padding may share its id with the end of turn."""
    return np.concatenate([np.full(len(ids), trained) for ids, trained in parts])


def begin(parts: Sequence[Part], beginning: list[int]) -> list[Part]:
    """Put the beginning of text before `parts`, unless a template has written it already."""
    first = [id_ for ids, _ in parts for id_ in ids[: len(beginning)]][: len(beginning)]
    return list(parts) if first == beginning else [(beginning, False), *parts]


def cut(parts: Sequence[Part], limit: int, *, head: int = 0) -> list[Part]:
    """Shorten a row's parts to `limit` tokens, keeping the answer.

    The last part is the answer. What stands before it loses tokens from its beginning, down to a quarter of the limit;
    only then the answer loses tokens from its end. The first `head` tokens, the beginning of text, stay.
    """
    if sum(len(ids) for ids, _ in parts) <= limit:
        return list(parts)
    if head:
        (first, flag), *rest = parts
        return [(first[:head], flag), *cut([(first[head:], flag), *rest], limit - head)]
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


def _at(place: int | str, error: DataError) -> DataError:
    where = f"row {place}" if isinstance(place, int) else place
    return DataError(f"{where}: {error.message}", fields=error.fields, hint=error.hint, code=error.code)
