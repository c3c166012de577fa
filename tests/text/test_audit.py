"""The audit sees every mask that is wrong, whatever let it through, and shows what is trained."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support import families, tiny
from tests.support.encoder_faults import right_cut, tokenised_whole
from trainers.text.audit import audit, refuse
from trainers.text.tokenized_data import tokenize_rows
from tunesmith.errors import DataError
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.text import chat_templates
from tunesmith.text import tokenization as encoder_module
from tunesmith.text.columns import find_format
from tunesmith.text.control_tokens import ControlTokens
from tunesmith.text.formats import Example, turns

ROWS = [{"prompt": f"say {n}", "response": f"it is {n}"} for n in range(50)]
LONG = [{"prompt": "0123456789" * 10, "response": "the answer"}] * 4


def report_of(
    data: list[dict[str, Any]],
    tokenizer: Any = None,
    *,
    training_type: str = "text-question-answering",
    history: bool = False,
    **given: Any,
) -> AuditReport:
    tokenizer = tokenizer or tiny.make_tokenizer()
    h = tiny.hyperparameters(**{"max_seq_length": 256, **given})
    advanced = tiny.advanced(train_on_history=history)
    rows = tokenize_rows(data, tokenizer, hyperparameters=h, advanced=advanced, training_type=training_type)
    row_format = find_format(list(data[0]), h, training_type=training_type)
    found = [turns(row, row_format, h, number) for number, row in enumerate(data)]
    examples = [example for example in found if isinstance(example, Example)]
    return audit(rows, examples, tokenizer, hyperparameters=h, advanced=advanced)


def codes(report: AuditReport) -> dict[str, str]:
    return {finding.code: finding.level for finding in report.findings}


def test_rows_that_are_right_are_let_through_and_shown() -> None:
    report = report_of([*ROWS, {"prompt": "x", "response": ""}])
    refuse(report)
    assert report.findings == []
    assert (report.counts.rows, report.counts.skipped, report.counts.ended) == (50, 1, 50)
    assert (report.checked, report.off, report.ends) == (50, 0, ["<|end|>"])
    assert report.rows[3].pieces == [("<|user|>say 3<|end|>\n<|assistant|>", False), ("it is 3<|end|>", True)]
    assert sum(report.counts.lengths.values()) == 50
    assert AuditReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("tokenizer", "options"),
    [
        (families.chatml, {}),
        (families.llama3, {}),
        (families.gemma, {}),
        (families.phi3, {}),
        (families.qwen3, {}),
        (lambda: families.qwen3(template=families.QWEN3_THINKING), {}),
        (families.mistral, {}),
        (lambda: families.make_sentencepiece(template=families.LLAMA2), {}),
        (lambda: families.make_sentencepiece(template=families.ZEPHYR), {}),
        (families.mistral, {"instruction_template": "Q:", "response_template": "\nA:"}),
        (families.make_sentencepiece, {"instruction_template": "Q:", "response_template": "\nA:"}),
        (families.chatml, {"max_seq_length": 16}),
        (families.llama3, {"max_seq_length": 20}),
    ],
)
@pytest.mark.parametrize("history", [False, True])
def test_what_the_tokens_are_made_of_is_right_by_the_audit_too(
    tokenizer: Callable[[], Any], options: dict[str, Any], history: bool
) -> None:
    qwen = "<think>" in (tokenizer().chat_template or "")
    turns_before = [] if qwen and history else [["q", "a"], ["r", "b"]]
    data = [{"prompt": f"say {n}", "response": f"it is {n}", "history": turns_before} for n in range(10)]
    report = report_of(data, tokenizer(), history=history, history_field="history", **options)
    assert (report.checked, report.off) == (10, 0)


def test_plain_text_is_audited_too() -> None:
    report = report_of([{"prompt": "once upon a time"}] * 3, training_type="text-generation")
    assert (report.off, report.counts.ended, report.findings) == (0, 3, [])


@pytest.mark.parametrize(
    ("target", "attribute", "without", "code", "tokenizer", "data", "options"),
    [
        (encoder_module, "cut", right_cut, "rows_untrained", families.chatml, LONG, {"max_seq_length": 40}),
        (
            chat_templates,
            "trained_ends",
            lambda tail, control: [""],
            "end_of_turn_untrained",
            families.chatml,
            ROWS,
            {},
        ),
        (
            chat_templates,
            "trained_ends",
            lambda tail, control: [tail],
            "end_of_turn_untrained",
            families.chatml,
            ROWS,
            {},
        ),
        (ControlTokens, "ended", lambda self, text: text, "end_of_turn_untrained", families.mistral, ROWS, {
            "instruction_template": "Q:"}),
        (
            chat_templates,
            "check_answer_kept",
            lambda answer, span: None,
            "mask_off",
            families.r1,
            [{"prompt": "a", "response": "<think>\nx\n</think>\n\nb"}],
            {},
        ),
        (
            chat_templates,
            "answer_span",
            lambda asked, answered: answered[len(asked) :],
            "mask_off",
            lambda: families.chatml(template=families.CHATML.replace("assistant\n{% endif", "assistant:\n{% endif")),
            ROWS,
            {},
        ),
        (encoder_module, "history_is_trained", lambda advanced: True, "mask_off", families.chatml, [
            {"prompt": "c", "response": "d", "history": [["a", "b"]]}], {"history_field": "history"}),
        (
            encoder_module.TextTokens,
            "encode",
            tokenised_whole,
            "mask_off",
            lambda: families.make(["</s>"], eos="</s>", merges=[("Ġ", "i")]),
            ROWS,
            {"response_template": " A: "},
        ),
        (
            encoder_module.TextTokens,
            "_behind",
            lambda self, before, ids, text: self._ids(text),
            "mask_off",
            families.make_sentencepiece,
            ROWS,
            {"response_template": "A:"},
        ),
    ],
)  # fmt: skip
def test_what_a_missing_guard_lets_through_the_audit_refuses(
    target: Any,
    attribute: str,
    without: Callable[..., Any],
    code: str,
    tokenizer: Callable[[], Any],
    data: list[dict[str, Any]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, attribute, without)
    report = report_of(data, tokenizer(), **options)
    assert codes(report).get(code) == "refused"
    with pytest.raises(DataError):
        refuse(report)


def test_one_row_in_a_hundred_may_be_wrong_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "cut", right_cut)
    short = [{"prompt": "a", "response": "b"}] * 99
    assert report_of([*short, *LONG[:1]], families.chatml(), max_seq_length=40).refusal is None
    refused = report_of([*short, *LONG[:2]], families.chatml(), max_seq_length=40).refusal
    assert refused is not None
    assert refused.code == "rows_untrained"
    assert "2 of 101" in refused.message


def test_a_prompt_that_would_share_a_token_with_its_answer_is_told() -> None:
    tokenizer = families.make(["</s>"], eos="</s>", merges=[("Ġ", "i")])
    report = report_of(ROWS, tokenizer, response_template=" A: ")
    assert (report.merged, report.off) == (50, 0)
    assert codes(report) == {"tokens_merged": "warning"}


def test_answers_that_are_cut_and_words_of_control_in_the_data_are_told() -> None:
    data = [{"prompt": "a", "response": "b" * 300}, {"prompt": "<|end|>", "response": "b"}]
    report = report_of(data)
    assert codes(report) == {
        "answers_cut": "warning",
        "rows_truncated": "warning",
        "control_tokens_in_data": "warning",
    }
    assert report.off == 0


def test_a_long_piece_is_shown_without_its_middle() -> None:
    report = report_of([{"prompt": "a", "response": "b" * 3000}], max_seq_length=4096)
    shown = report.rows[0].pieces[1][0]
    assert len(shown) < 1300
    assert shown.endswith("b<|end|>")
