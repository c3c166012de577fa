"""Local platforms that `tunesmith down` ended: what ran on them was lost on purpose."""

from __future__ import annotations

from contextlib import suppress

from tunesmith.settings import Settings

_KEPT = 100


def note(settings: Settings, mark: str) -> None:
    """Note that the platform of this mark is taken down; only the newest notes are kept."""
    path = settings.home / "taken_down"
    partial = path.with_name(".taken_down.partial")
    partial.write_text("".join(f"{each}\n" for each in [*_marks(settings), mark][-_KEPT:]))
    partial.replace(path)


def was_taken_down(settings: Settings, mark: str | None) -> bool:
    """Whether the platform of this mark was taken down; None is the mark of no platform."""
    return mark in _marks(settings)


def _marks(settings: Settings) -> list[str]:
    with suppress(FileNotFoundError):
        return (settings.home / "taken_down").read_text().split()
    return []
