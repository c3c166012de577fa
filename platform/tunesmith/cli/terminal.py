"""The one way to the terminal: whatever somebody else has written is shown, and never obeyed.

Names, messages, log lines and answers of models come from strangers. Escape sequences in them would move the cursor,
rename the window or write to the clipboard of whoever looks. Nothing else in the command line prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from tunesmith.visible_text import visible, visible_json

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


class Terminal(Console):
    """A console whose own colours and cursor are sent, while the characters of what is printed are all shown.

    Text of others is made visible where it is put into a Text (`shown`), because rich drops some characters there; what
    was forgotten is made visible here.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible(segment.text, lines=True), segment.style)


def shown(text: object, *, lines: bool = False) -> str:
    """Text of others as a part of a line, or as `lines` of its own."""
    text = str(text)
    return visible(text.replace("\r\n", "\n") if lines else text, lines=lines)


def echo(text: str, *, nl: bool = True) -> None:
    """Print lines as they are, but for characters that are not shown."""
    typer.echo(shown(text, lines=True), nl=nl)


def echo_json(text: str) -> None:
    """Print JSON, with such characters escaped: it says the same."""
    typer.echo(visible_json(text))
