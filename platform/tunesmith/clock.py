"""UTC time as the platform writes it: `2026-01-31T12:00:00.123Z`, which sorts as text."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def utc_text(seconds: float | None = None) -> str:
    """`seconds` since the epoch (default: now) as UTC text, to the millisecond."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def seconds(text: str) -> float:
    """Seconds since the epoch of a UTC text."""
    return datetime.fromisoformat(text).timestamp()
