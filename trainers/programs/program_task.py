"""What one worker of a custom job is to do, and where it works on its node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainers.isolation.program import program_mark
from tunesmith.jobs.attempts import attempt_name
from tunesmith.jobs.spec import CustomJob
from tunesmith.settings import Settings


@dataclass(frozen=True)
class ProgramTask:
    """What one worker is to do."""

    job: CustomJob
    attempt: int
    storage_url: str
    deadline: float | None
    """Seconds since the epoch at which the job is stopped."""
    rank: int
    local_rank: int
    master_addr: str
    """The address of the first worker's node."""
    master_port: int
    alone_on_node: bool
    """Whether all workers of the job are on one node."""

    @property
    def gang(self) -> str:
        """A name that all workers of the attempt share."""
        return attempt_name(self.job.id, self.attempt)

    @property
    def mark(self) -> str:
        """The name of this worker's run, which its processes carry."""
        return program_mark(self.job.id, self.attempt, self.rank)

    def folder(self, settings: Settings) -> Path:
        """The folder of this worker's run on its node."""
        return settings.home / "runs" / self.mark

    def network_file(self, settings: Settings) -> Path:
        """The file by which the workers of a node find their network."""
        return settings.home / "runs" / f"{self.gang}.network"
