"""The platform's own log: a record begins a line, and nothing that it quotes can."""

from __future__ import annotations

import logging

from tunesmith.visible_text import visible

FOLLOWING = "  | "
"""What a further line of a record begins with."""


class LineFormatter(logging.Formatter):
    """As the standard library's, but text of others can neither begin a record's line nor act on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), lines=True).replace("\n", f"\n{FOLLOWING}")
