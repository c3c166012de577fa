"""From turns to text, by the model's chat template or the user's own, with a mark on what is trained.

The rule: a row is trained on what the model sees when it answers. The prompt is what the template gives for the turns
before the answer with `add_generation_prompt`; the answer follows it, up to and including the end of turn. A template
that cannot give both is refused with a DataError `template_*`; a mask is never slightly wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from tunesmith.errors import DataError
from tunesmith.hyperparameters.definitions import EncodingHyperparameters
from tunesmith.text.control_tokens import PROBE, ControlTokens
from tunesmith.text.formats import Example, Turn

_OWN_TEMPLATES = "set instruction_template and response_template, which take the place of the model's chat template"

Message = dict[str, str]


@dataclass(frozen=True)
class Piece:
    """Text of a row that is tokenised by itself, and whether its tokens are trained."""

    text: str
    trained: bool


class Template:
    """How the turns of an example become text."""

    def __init__(
        self, tokenizer: Any, hyperparameters: EncodingHyperparameters, *, train_on_history: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._prefix = hyperparameters.prefix
        self._train_on_history = train_on_history
        self.control = ControlTokens(tokenizer)
        given = hyperparameters.instruction_template, hyperparameters.response_template
        self.chat = given == (None, None) and tokenizer.chat_template is not None
        """Whether the model's chat template is used; it puts a beginning of text itself, where there is to be one."""
        self._instruction = given[0] or ""
        self._response = given[1] if given[1] is not None else "\n"
        self._tails: list[str] = []
        """What the template was seen to put after a last answer."""

    def pieces(self, example: Example) -> list[Piece]:
        """The pieces of an example in order: a context, then the answer to it, up to the last answer."""
        turns = example.turns
        if turns[0].role == "text":
            return [Piece("", False), Piece(self.control.ended(self.control.hide(turns[0].text)), True)]
        if turns[-1].role != "assistant":
            raise DataError("the last turn must be the assistant's")
        if self.chat:
            return self._chat_pieces(turns)
        return self._own_pieces(turns)

    def prompt(self, example: Example) -> str:
        """The text that the model answers: everything before the last answer, with stand-ins. Empty for plain text."""
        turns = example.turns[:-1] if example.turns[-1].role == "assistant" else example.turns
        if turns[0].role == "text":
            return ""
        if self.chat:
            return self._asked(self._messages(turns))
        return "".join(text for text, _ in self._own_texts(turns))

    def _chat_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        messages = self._messages(turns)
        asked = self._asked(messages[:-1])
        answer, tail = self._answer(messages, asked)
        ends = trained_ends(tail, self.control)
        pieces = self._history_pieces(messages, asked) if self._train_on_history else [Piece(asked, False)]
        return [*pieces, Piece(answer + ends[0], True)]

    def _history_pieces(self, messages: list[Message], asked: str) -> list[Piece]:
        """`asked` in pieces. The answers in it are trained, each as if it were the last."""
        pieces: list[Piece] = []
        done = 0
        for place, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            before = self._asked(messages[:place])
            answer, tail = self._answer(messages[: place + 1], before)
            end = end_in_history(asked, before + answer, trained_ends(tail, self.control))
            pieces += [Piece(asked[done : len(before)], False), Piece(asked[len(before) : end], True)]
            done = end
        return [*pieces, Piece(asked[done:], False)]

    def _asked(self, messages: list[Message]) -> str:
        asked = self._render(messages, add_generation_prompt=True)
        check_prompt_kept(messages, asked)
        return asked

    def _answer(self, messages: list[Message], asked: str) -> tuple[str, str]:
        """What the template makes of the last message after `asked`: the answer, and what follows it."""
        answered = self._render(messages, add_generation_prompt=False)
        span = answer_span(asked, answered)
        text = messages[-1]["content"].strip()
        tail = next((tail for tail in self._tails if _ends(span, text, tail)), None)
        if tail is None:
            tail = self._tail(messages)
        if text not in span:
            # The generation prompt may have opened the answer already (`<think>`).
            opened = self._render(messages[:-1], add_generation_prompt=False)
            check_answer_kept(text, answered[len(opened) :] if answered.startswith(opened) else span)
        return span.removesuffix(tail), tail

    def _tail(self, messages: list[Message]) -> str:
        """What follows an answer at the place of the last message."""
        rendered = self._render([*messages[:-1], {"role": "assistant", "content": PROBE}], add_generation_prompt=False)
        _, found, tail = rendered.rpartition(PROBE)
        if not found:
            raise _drops("answer")
        self.control.guard(trained_ends(tail, self.control)[-1])
        # The longest first: another one may be its end.
        self._tails = sorted({*self._tails, tail}, key=len, reverse=True)
        return tail

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        if not self._tails:
            self._tail([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        texts = (self.control.hide(turn.text) for turn in turns)
        return [
            {"role": turn.role, "content": f"{self._prefix}{text}" if turn.role == "user" else text}
            for turn, text in zip(turns, texts, strict=True)
        ]

    def _own_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        texts = self._own_texts(turns)
        for place, (text, is_answer) in enumerate(texts):
            trained = is_answer and (self._train_on_history or place == len(texts) - 1)
            if pieces and not trained and not pieces[-1].trained:
                pieces[-1] = Piece(pieces[-1].text + text, False)
            else:
                pieces.append(Piece(text, trained))
        return pieces

    def _own_texts(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Every turn by the user's templates, and whether it is an answer; an answer ends with the end of text."""
        before, after = f"{self._prefix}{self._instruction}", self._response
        texts = []
        for turn in turns:
            text = self.control.hide(turn.text)
            if turn.role == "assistant":
                texts.append((self.control.ended(text), True))
            else:
                texts.append((f"{text}\n" if turn.role == "system" else f"{before}{text}{after}", False))
        return texts

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except MemoryError:
            raise DataError(
                "the model's chat template takes more memory than it may have",
                hint=_OWN_TEMPLATES,
                code="too_much_memory",
            ) from None
        except TemplateError as error:
            raise _refuses(str(error)) from None
        except Exception as error:  # noqa: BLE001 - a template is a program: it raises what it likes
            raise _refuses(f"{type(error).__name__}: {error}") from None
        return text


def _refuses(why: str) -> DataError:
    return DataError(
        f"the model's chat template does not take these turns: {why}", hint=_OWN_TEMPLATES, code="template_refuses"
    )


def answer_span(asked: str, answered: str) -> str:
    """What `answered` has after `asked`. Raises DataError where the text before the answer is not the prompt for it."""
    if not answered.startswith(asked):
        raise DataError(
            "the model's chat template writes other text before an answer than it asks for it with, so that what is "
            "trained is not what the model will see",
            hint=_OWN_TEMPLATES,
            code="template_not_additive",
        )
    return answered[len(asked) :]


def check_prompt_kept(messages: Sequence[Message], asked: str) -> None:
    """Raise DataError where the template leaves out what the system or the user said. Earlier answers may lose text."""
    for message in messages:
        if message["role"] != "assistant" and not _holds(asked, message["content"]):
            raise _drops(f"{message['role']}'s text")


def check_answer_kept(answer: str, span: str) -> None:
    """Raise DataError where the template leaves out the answer or a part of it (`<think>`). White space may change."""
    if not _holds(span, answer):
        raise _drops("answer")


def trained_ends(tail: str, control: ControlTokens) -> list[str]:
    """What is trained of the text after an answer: up to the end of turn, and not what follows it.

    The end of turn is the first control token. An end of text that follows it at once is trained too: the first of
    two is for a turn, the second for the text. Where the template ends a turn by no token, the end of text is added.
    """
    first = control.first_in_template(tail)
    if first is None:
        return [control.ended(tail.rstrip()), tail.rstrip()]
    ends = [tail[: first.end()]]
    text, eos, _ = tail.partition(control.eos) if control.eos else (tail, "", "")
    if eos and not control.without(text).strip():
        ends.insert(0, text + eos)
    return ends


def end_in_history(asked: str, answered: str, ends: Sequence[str]) -> int:
    """Where in `asked` the answer that `answered` closes with ends, its end of turn included. DataError where the
    template writes it otherwise once another turn follows."""
    for end in ends:
        if asked.startswith(answered + end):
            return len(answered + end)
    raise DataError(
        "the model's chat template changes an answer once another turn follows it, so that it cannot be trained as "
        "part of the history",
        fields=["advanced.train_on_history"],
        hint="leave train_on_history off, and give each answer to be trained a row of its own",
        code="template_changes_history",
    )


def _ends(span: str, answer: str, tail: str) -> bool:
    """Whether `span` is an answer and then `tail`; the answer's last characters are enough to tell."""
    return span.endswith(tail) and span.removesuffix(tail).rstrip().endswith(answer[-16:])


def _drops(what: str) -> DataError:
    return DataError(
        f"the model's chat template leaves out the {what} or a part of it",
        hint=_OWN_TEMPLATES,
        code="template_drops_text",
    )


def _holds(text: str, part: str) -> bool:
    """Whether `text` contains `part`, white space apart."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
