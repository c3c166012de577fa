"""The tokens that steer a model, and how the same words in data stay plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.errors import DataError

_STAND_IN = 0x100000
"""First of the private-use characters (plane 16) that stand in for control tokens written out in data."""
_PRIVATE = re.compile("[\U00100000-\U0010ffff]")
_STAND_INS = re.compile("([\U00100000-\U0010fffc])")
PROBE = "\U0010fffd"
"""A text that no data holds, to see what a template does with it."""


class ControlTokens:
    """The control tokens of one tokenizer.

    Data that spells out `<|im_end|>` or `</s>` (HTML does) must not end a turn. Before a template is rendered,
    stand-ins take the place of such words; the tokenizer puts the words back as ordinary tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {str(token): (id_, token.special) for id_, token in tokenizer.added_tokens_decoder.items()}
        special = {text: id_ for text, (id_, is_special) in added.items() if is_special and text.strip()}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.eos: str = tokenizer.eos_token or ""
        self.ids = set(special.values())
        """Token ids that can end a turn."""
        self.texts = sorted(special, key=len, reverse=True)
        # Some models mark the end of a turn by an added token that is not declared special.
        self._added = {text: id_ for text, (id_, _) in added.items() if text.strip()} | special
        self._in_template = _any_of(self._added)
        self._in_data = _any_of(self.texts)

    def ended(self, text: str) -> str:
        """`text` with the end of text after it, where the tokenizer has one."""
        return text + self.eos

    def guard(self, ending: str) -> None:
        """Add the tokens of a template's end of turn to those that data may not write."""
        for text in self._in_template.findall(ending) if self._added else []:
            self.ids.add(self._added[text])
            if text not in self.texts:
                self.texts.append(text)
                self._in_data = _any_of(self.texts)

    def hide(self, text: str) -> str:
        """`text` of data, with a stand-in for every control token it spells out."""
        if not text.isascii() and _PRIVATE.search(text):
            raise DataError("a text holds a private-use character of plane 16 (U+100000 and above)")
        if not self.texts:
            return text
        return self._in_data.sub(lambda found: chr(_STAND_IN + self.texts.index(found[0])), text)

    def show(self, text: str) -> str:
        """The words behind the stand-ins."""
        return "".join(word for word, _ in self.split(text))

    def split(self, text: str) -> list[tuple[str, bool]]:
        """`text` in parts, each with whether it is a control token's words, to be tokenised as plain text."""
        if text.isascii():
            return [(text, False)]
        parts = _STAND_INS.split(text)
        return [
            (self.texts[ord(part) - _STAND_IN], True) if place % 2 else (part, False)
            for place, part in enumerate(parts)
            if part
        ]

    def first_in_template(self, text: str) -> re.Match[str] | None:
        return self._in_template.search(text) if self._added else None

    def without(self, text: str) -> str:
        return self._in_template.sub("", text) if self._added else text


def _any_of(texts: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
