"""The mask of every case is the one written by hand, and no guard of it can be taken away unseen."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support import tiny
from tests.support.encoder_faults import right_cut, tokenised_whole
from tests.support.mask_cases import CASES, Case
from tunesmith.errors import DataError
from tunesmith.text import chat_templates, tokenization
from tunesmith.text.control_tokens import ControlTokens
from tunesmith.text.formats import Example, Turn
from tunesmith.text.tokenization import Encoder, Part


@cache
def _tokenizer(name: str) -> Any:
    return next(case for case in CASES if case.name == name).tokenizer()


def tokenizer_of(case: Case) -> Any:
    return _tokenizer(case.name)


def outcome(case: Case) -> str:
    """The row of a case with its trained tokens marked, or the code that it is refused with."""
    tokenizer = tokenizer_of(case)
    h, advanced = (
        tiny.hyperparameters(**{"max_seq_length": 256, **case.settings}),
        tiny.advanced(train_on_history=case.history),
    )
    example = Example([Turn(role, text) for role, text in case.said])  # type: ignore[arg-type]
    try:
        row = Encoder(tokenizer, h, advanced).encode([example])[0]
    except DataError as error:
        return error.code
    return marked(row.ids.tolist(), row.trained.tolist(), tokenizer, "·" if "·" in case.expected else "")


def marked(ids: list[int], trained: list[bool], tokenizer: Any, between: str) -> str:
    borders = [at for at in range(1, len(ids)) if trained[at] != trained[at - 1]]
    runs = []
    for start, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        if between:
            text = between.join(tokenizer.decode([id_]) for id_ in ids[start:end])
        else:
            text = tokenizer.decode(ids[start:end])
        runs.append(f"⟦{text}⟧" if trained[start] else text)
    return between.join(runs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_the_mask_is_the_one_written_by_hand(case: Case) -> None:
    assert outcome(case) == case.expected


@pytest.mark.parametrize("case", [case for case in CASES if "⟦" in case.expected], ids=lambda case: case.name)
def test_the_prompt_has_the_tokens_that_generation_gives_the_model(case: Case) -> None:
    tokenizer, h = tokenizer_of(case), tiny.hyperparameters(**{**case.settings, "max_seq_length": 4096})
    example = Example([Turn(role, text) for role, text in case.said])  # type: ignore[arg-type]
    encoder = Encoder(tokenizer, h, tiny.advanced(train_on_history=False))
    row = encoder.encode([example])[0]
    prompt = row.ids[~row.trained].tolist()
    assert encoder.prompt_ids(example).tolist() == prompt
    if encoder.template.chat and not row.spelled_out and case.said[-1][0] == "assistant":
        messages = [{"role": role, "content": text} for role, text in case.said[:-1]]
        for message in messages:
            if message["role"] == "user":
                message["content"] = h.prefix + message["content"]
        stock = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert stock == prompt


def test_at_least_twelve_cases_are_published_faults() -> None:
    sources = {case.source for case in CASES if case.source}
    assert len(CASES) >= 20
    assert len(sources) >= 12
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source) for source in sources)
    assert len({case.name for case in CASES}) == len(CASES)


def _mask_by_id(parts: list[Part]) -> Any:
    """As a collator does that masks padding by its id: here the token of every end of turn in these cases."""
    ids = np.concatenate([np.asarray(ids) for ids, _ in parts])
    trained = np.concatenate([np.full(len(ids), flag) for ids, flag in parts])
    return trained & (ids != ids[-1])


Guard = tuple[Any, str, Callable[..., Any]]
GUARDS: dict[str, Guard] = {
    "a prompt must stand before its answer": (
        chat_templates,
        "answer_span",
        lambda asked, answered: answered[len(asked) :],
    ),
    "what was asked must not be left out": (chat_templates, "check_prompt_kept", lambda messages, asked: None),
    "an answer must not be left out": (chat_templates, "check_answer_kept", lambda answer, span: None),
    "an answer ends with its end of turn": (chat_templates, "trained_ends", lambda tail, control: [""]),
    "nothing is trained after it": (chat_templates, "trained_ends", lambda tail, control: [tail]),
    "an answer in the history is what it was": (
        chat_templates,
        "end_in_history",
        lambda asked, answered, ends: len(answered + ends[-1]),
    ),
    "the end of text is put where a template has none": (ControlTokens, "ended", lambda self, text: text),
    "data spells out no control token": (ControlTokens, "hide", lambda self, text: text),
    "nor an end of turn that is not declared special": (ControlTokens, "guard", lambda self, ending: None),
    "history is context": (tokenization, "history_is_trained", lambda advanced: True),
    "history is trained where it is asked for": (tokenization, "history_is_trained", lambda advanced: False),
    "marks go by place": (tokenization, "mask", _mask_by_id),
    "no second beginning of text": (tokenization, "begin", lambda parts, beginning: [(beginning, False), *parts]),
    "a beginning of text": (tokenization, "begin", lambda parts, beginning: list(parts)),
    "the answer is kept": (tokenization, "cut", right_cut),
    "the beginning of text is kept": (
        tokenization,
        "cut",
        lambda parts, limit, head, cut=tokenization.cut: cut(parts, limit),
    ),
    "prompt and answer are tokenised apart": (tokenization.TextTokens, "encode", tokenised_whole),
    "text behind text gets no space": (
        tokenization.TextTokens,
        "_behind",
        lambda self, before, ids, text: self._ids(text),
    ),
    "control tokens that are spelled out are split": (
        tokenization.TextTokens,
        "_plain",
        lambda self, text: self._ids(text),
    ),
}


RED = {
    "a prompt must stand before its answer": "a template that asks otherwise than it answers is refused",
    "what was asked must not be left out": "a template that passes over the system text is refused",
    "an answer must not be left out": "a template that drops the thought of the last answer is refused",
    "an answer ends with its end of turn": "the end of turn is trained where it is not the tokenizer's end of text",
    "nothing is trained after it": "a header that the template puts after the last answer is not trained",
    "an answer in the history is what it was": "an answer that loses its thought in the history is not trained there",
    "the end of text is put where a template has none": "the end of text ends an answer in templates of the user's own",
    "data spells out no control token": "control tokens that data spells out are plain text",
    "nor an end of turn that is not declared special": "so is an end of turn that is not declared special",
    "history is context": "answers in the history are not learnt",
    "history is trained where it is asked for": "with train_on_history every answer is trained",
    "marks go by place": "the end of turn is trained though padding has its id",
    "no second beginning of text": "and none where they write it",
    "a beginning of text": "templates of the user's own get the tokenizer's, once, and none before the answer",
    "the answer is kept": "a long prompt leaves the answer whole",
    "the beginning of text is kept": "the beginning of text stays",
    "prompt and answer are tokenised apart": "a prompt that ends in a space keeps it",
    "text behind text gets no space": "no space gets in before an answer",
    "control tokens that are spelled out are split": "so are tags of HTML",
}
"""Of the cases that show a guard's lack, one that is made for it."""


@pytest.mark.parametrize("name", GUARDS)
def test_taking_away_a_guard_turns_a_case_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, attribute, without = GUARDS[name]
    monkeypatch.setattr(target, attribute, without)
    assert RED[name] in [case.name for case in CASES if outcome(case) != case.expected]
