"""What all parts of one rank share."""

from __future__ import annotations

from dataclasses import dataclass

from ..observe.telemetry import Telemetry
from ..observe.trace import Trace
from ..settings import Settings


@dataclass(frozen=True)
class RankContext:
    """Where a rank stands in its pipeline, what is set, and what counts and records there."""

    stage: int
    stages: int
    rank: int  # within the stage
    settings: Settings
    telemetry: Telemetry
    trace: Trace

    @classmethod
    def begin(
        cls, stage: int, stages: int, settings: Settings, *, rank: int = 0, replica: int | None = None
    ) -> RankContext:
        """With counters and, where the settings ask for one, a trace that begin now."""
        trace = Trace(enabled=settings.trace_dir is not None)
        return cls(stage, stages, rank, settings, Telemetry(stage, rank, replica=replica), trace)

    @property
    def where(self) -> str:
        """For errors."""
        return f"stage {self.stage} rank {self.rank}"

    @property
    def check_all(self) -> bool:
        """Whether frames of any size are under the checksum."""
        return self.settings.checksum == "full"
