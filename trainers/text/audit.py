"""The mask audit: before any training, the tokens are decoded and compared with what was asked and answered.

It does not trust the code that made the tokens: prompts are compared with what the tokenizer's own template method
gives, answers with the rows' text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers.text.shards import TokenizedRows
from tunesmith.errors import DataError
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.jobs.audit_report import AuditCounts, AuditedRow, AuditReport, Finding
from tunesmith.text.formats import Example
from tunesmith.text.tokenization import Encoder

CHECKED_ROWS = 256
"""Rows that are decoded and compared, the first ones."""
SHOWN_ROWS = 5
SHOWN_CHARACTERS = 1200
"""A longer piece of a row is shown without its middle."""
SHARE = 0.01
"""The share of rows that may be wrong before the job is refused."""


def audit(
    rows: TokenizedRows,
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    hyperparameters: EncodingHyperparameters,
    advanced: EncodingAdvanced,
    model: str = "",
    dataset: str = "",
    share: float = SHARE,
) -> AuditReport:
    """What `rows` train. `examples` are the turns of the first of them; `share` is the part that may be wrong.

    The findings say what is refused (see `refuse`): rows without a trained token, an end of turn that is never
    trained, masks that are off.
    """
    checker = _Checker(tokenizer, hyperparameters, advanced)
    checks = [
        checker.check(example, rows.ids(row), rows.trained(row))
        for row, example in zip(range(len(rows)), examples, strict=False)
    ]
    counts = rows.report
    off, merged = sum(check.off for check in checks), sum(check.merged for check in checks)
    shown = min(SHOWN_ROWS, len(rows))
    return AuditReport(
        model=model,
        dataset=dataset,
        counts=counts,
        checked=len(checks),
        off=off,
        merged=merged,
        ends=list(dict.fromkeys(check.end for check in checks if check.end)),
        findings=list(_findings(counts, checked=len(checks), off=off, merged=merged, share=share)),
        rows=[_shown(row, rows.ids(row), rows.trained(row), tokenizer) for row in range(shown)],
    )


def refuse(report: AuditReport) -> None:
    """Raise DataError where the report holds a reason not to train."""
    if (finding := report.refusal) is not None:
        raise DataError(
            f"the audit refuses the data: {finding.message}",
            hint=finding.hint or "`tunesmith datasets audit` shows what would be trained",
            code=finding.code,
        )


def _findings(counts: AuditCounts, *, checked: int, off: int, merged: int, share: float) -> Iterator[Finding]:
    def of(part: int, whole: int) -> str:
        return f"{part:,} of {whole:,} rows"

    if counts.untrained > share * counts.rows:
        yield Finding(
            level="refused",
            code="rows_untrained",
            message=f"{of(counts.untrained, counts.rows)} have no trained token; {share:.0%} may",
            hint="raise max_seq_length",
        )
    if counts.ended == 0:
        yield Finding(
            level="refused",
            code="end_of_turn_untrained",
            message="no row trains the end of turn: the new model would not know when to stop",
            hint="raise max_seq_length" if counts.answer_cut else "the tokenizer needs an end-of-text token",
        )
    elif counts.answer_cut > share * counts.rows:
        message = f"the answers of {of(counts.answer_cut, counts.rows)} are cut, and train no end of turn"
        yield Finding(level="warning", code="answers_cut", message=message, hint="raise max_seq_length")
    if off > share * checked:
        yield Finding(
            level="refused",
            code="mask_off",
            message=f"what is trained of {of(off, checked)} is not the answer after its prompt; {share:.0%} may be so",
            hint="set instruction_template and response_template",
        )
    if merged > share * checked:
        yield Finding(
            level="warning",
            code="tokens_merged",
            message=f"prompt and answer of {of(merged, checked)} would share a token; the prompt keeps its own ones",
            hint="let response_template end without a space",
        )
    if counts.truncated > share * counts.rows:
        message = f"{of(counts.truncated, counts.rows)} are longer than max_seq_length and lost the beginning"
        yield Finding(level="warning", code="rows_truncated", message=message, hint="raise max_seq_length")
    if counts.spelled_out:
        message = f"{of(counts.spelled_out, counts.rows)} spell out control tokens, which are taken as plain text"
        yield Finding(level="warning", code="control_tokens_in_data", message=message)


@dataclass(frozen=True)
class _Check:
    off: bool
    merged: bool
    end: str
    """The last trained token, where it is an end of turn."""


class _Checker:
    def __init__(self, tokenizer: Any, hyperparameters: EncodingHyperparameters, advanced: EncodingAdvanced) -> None:
        self._tokenizer = tokenizer
        self._h = hyperparameters
        self._with_history = advanced.train_on_history
        self._encoder = Encoder(tokenizer, hyperparameters, EncodingAdvanced(train_on_history=False))
        self._control = self._encoder.template.control

    def check(self, example: Example, ids: npt.NDArray[np.int32], trained: npt.NDArray[np.bool_]) -> _Check:
        places = np.flatnonzero(trained)
        if not len(places):
            return _Check(off=True, merged=False, end="")
        gaps = np.flatnonzero(np.diff(places) > 1)
        start, last = int(places[gaps[-1] + 1 if len(gaps) else 0]), int(places[-1])
        answer = ids[start : last + 1].tolist()
        cut = len(ids) >= self._h.max_seq_length
        right = last == len(ids) - 1 and (self._with_history or not len(gaps))
        merged = False
        prompt: list[int] = []
        if example.turns[0].role != "text":
            prompt = self._encoder.prompt_ids(example).tolist()
            right &= self._is_prompt(ids[:start].tolist(), prompt, cut=cut) and self._is_stock(example, prompt)
            merged = right and not cut and self._merges(prompt, answer)
        ends = answer[-1] in self._control.ids
        right &= cut or self._reads_as(example, ids.tolist())
        right &= self._holds(example.turns[-1].text, prompt, answer, cut=cut and not ends)
        return _Check(off=not right, merged=merged, end=self._decode(answer[-1:]) if ends else "")

    def _is_prompt(self, before: list[int], prompt: list[int], *, cut: bool) -> bool:
        """Whether the row has, before the answer, the prompt that the model gets, or where it was cut the end of it."""
        if before == prompt:
            return True
        if cut and len(before) < len(prompt):
            # The beginning of text may have stayed.
            return before[1:] == prompt[len(prompt) - len(before) + 1 :]
        # Answers in the history that are trained are tokenised apart too.
        return self._with_history and self._decode(before) == self._decode(prompt)

    def _is_stock(self, example: Example, prompt: list[int]) -> bool:
        """Whether the tokenizer's own method gives the same prompt. It takes control tokens in data for real ones."""
        texts = [turn.text for turn in example.turns[:-1]]
        if not self._encoder.template.chat or any(self._control.hide(text) != text for text in texts):
            return True
        messages = [
            {"role": turn.role, "content": f"{self._h.prefix}{turn.text}" if turn.role == "user" else turn.text}
            for turn in example.turns[:-1]
        ]
        stock = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(stock) == prompt

    def _holds(self, text: str, prompt: list[int], answer: list[int], *, cut: bool) -> bool:
        """Whether the trained tokens are the answer, which the prompt may have begun (`<think>`)."""
        if self._tokenizer.unk_token_id in answer:
            return True  # what the tokenizer has no token for cannot be compared
        wanted, got = _squeezed(text), _squeezed(self._decode(answer))
        if cut:
            # The last character may have lost some of its bytes; the template may have put an empty thought before.
            got = got[max(0, got.find(wanted[:16])) : -1]
            return got in wanted
        before = _squeezed(self._decode(prompt))
        opened = (n for n in range(1, min(64, len(wanted))) if before.endswith(wanted[:n]))
        return wanted in got or any(wanted[n:] in got for n in opened)

    def _reads_as(self, example: Example, ids: list[int]) -> bool:
        """Whether the row decodes to the same text as its whole text tokenised at once, to the last space."""
        template = self._encoder.template
        text = "".join(template.control.show(piece.text) for piece in template.pieces(example))
        whole = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._decode(ids).removesuffix(self._decode(whole)) in ("", self._decode(self._encoder.beginning))

    def _merges(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether prompt and answer, tokenised as one text, have other tokens; not told where data is no plain text."""
        text = self._decode([*prompt, *answer])
        whole = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        controls = sum(id_ in self._control.ids for id_ in (*prompt, *answer))
        return len(whole) < len(prompt) + len(answer) and controls == sum(id_ in self._control.ids for id_ in whole)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _shown(row: int, ids: npt.NDArray[np.int32], trained: npt.NDArray[np.bool_], tokenizer: Any) -> AuditedRow:
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    pieces = [
        (_shortened(tokenizer.decode(ids[start:end].tolist())), bool(trained[start]))
        for start, end in pairwise(borders)
    ]
    return AuditedRow(row=row, tokens=len(ids), pieces=pieces)


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _squeezed(text: str) -> str:
    """`text` without white space, normalised as tokenizers normalise characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())
