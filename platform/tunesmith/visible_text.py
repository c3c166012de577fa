"""Text that somebody else has written, as it may be shown: characters that act on a terminal are spelled out.

Terminals obey escape sequences, and a text that turns the direction of writing, or holds marks without a width, reads
as another one than it is ("Trojan Source", Boucher and Anderson, 2021). None of them is sent; each is shown as Python
and JSON spell it.
"""

from __future__ import annotations

import re

_CONTROLS = "\x00-\x1f\x7f-\x9f"
"""C0, DEL and C1: 0x9b alone begins a sequence, as ESC [ does."""
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_HIDDEN = "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
"""Without width. U+200C and U+200D are not among them: Persian and emoji need those."""
_OTHERS = "\u2028\u2029\ud800-\udfff\U000e0000-\U000e0fff\U000f0000-\U0010ffff"
"""Ends of lines that are none to a terminal, half characters, tags, and what has no meaning of its own."""

_NOT_SHOWN = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_HIDDEN}{_OTHERS}]")
_NOT_SHOWN_IN_LINES = re.compile(f"(?![\n\t])[{_CONTROLS}{_DIRECTIONS}{_HIDDEN}{_OTHERS}]")


def visible(text: str, *, lines: bool = False, limit: int | None = None) -> str:
    r"""The text with every character spelled out that would not be shown: `\x1b`, `\u202e`.

    `lines`: ends of lines and tabs stay. `limit`: the most characters of it, the last one `…` where it is cut.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return (_NOT_SHOWN_IN_LINES if lines else _NOT_SHOWN).sub(_spelled, text)


def is_visible(text: str) -> bool:
    """Whether all of the text, which is one line, is shown as it is."""
    return _NOT_SHOWN.search(text) is None


def visible_json(text: str) -> str:
    """JSON with the same characters escaped, which changes nothing of what it says; its own ends of lines stay."""
    return _NOT_SHOWN_IN_LINES.sub(_escaped, text)


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
