"""The servers in turns: unpatched, patched, unpatched, patched; never two at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import requests

from ...certificates import VARIABLE as CERTIFICATES
from ...errors import PipelineError
from ..timeline.states import Timeline
from . import resources, speed
from .ab import turns
from .arguments import option
from .battery import choose
from .checks import checks
from .examine import Examination, Observed, observe
from .launch import LaunchedServer, LaunchError, reporting
from .lost_peer import lose_peer
from .plan import Plan
from .results import Check, Resources, Side, Speed, Verdict
from .served import ServedError, ask_served

MODE = "SGLANG_NPU_PP"
SPEED = "speed"
LOSS_LIMIT_S = 120.0
_IN_USE = re.compile(r"sglang-npu-pp: .* uses (?P<features>.+)$", re.M)


class CertifyError(PipelineError):
    """Nothing could be compared; one sentence."""


@dataclass
class Found:
    """What the turns have shown so far."""

    observed: list[Observed] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    resources: list[Resources] = field(default_factory=list)
    variants: dict[str, list[Speed]] = field(default_factory=dict)  # of --ab, by name
    slow: list[tuple[str, Side, str]] = field(default_factory=list)  # load, side, why it has no speed
    features: tuple[str, ...] = ()  # that the patched server used
    timeline: Timeline | None = None

    def checks(self) -> list[Check]:
        return [*checks(self.observed), *self._speed_checks()]

    def _speed_checks(self) -> Iterator[Check]:
        """A load that the unpatched server bears must not fail on the patched one."""
        for side, verdict in ((Side.UNPATCHED, Verdict.LEFT_OUT), (Side.PATCHED, Verdict.FAILED)):
            if lines := [f"{where}: {why}" for where, on, why in self.slow if on is side]:
                yield Check(SPEED, verdict, f"The {side} server has no speed.", lines)
                return
        if self.speeds:
            yield Check(SPEED, Verdict.PASSED, "Both servers have borne the load.")


class Turns:
    """Starts each server, examines it, measures it, and ends it.

    `trial`: folder of the certificate with which a build that is not known is tried; None for one that is.
    """

    def __init__(self, plan: Plan, folder: Path, trial: Path | None, say: Callable[[str], None]) -> None:
        self.found = Found()
        self._plan, self._folder, self._trial, self._say = plan, folder, trial, say
        self._examination: Examination | None = None
        self._refused: dict[str, str] = {}

    def run(self) -> Found:
        """All turns, up to the first server that ends by itself.

        Raises:
            CertifyError: the unpatched server does not start, or is not one that can be examined.
        """
        for number in range(1, self._plan.rounds + 1):
            for turn in (self._unpatched, self._patched):
                turn(number)
                if self.found.observed[-1].ended:
                    return self.found
        if self._plan.switches and self._plan.speed is not None:
            self._measure_switches(self._plan.speed)
        return self.found

    # --- a turn -----------------------------------------------------------------------------------

    def _unpatched(self, number: int) -> None:
        try:
            with self._server(Side.UNPATCHED, number, {MODE: "0"}) as server:
                found = observe(server, Side.UNPATCHED, number, self._asked(server), times=2)
                self._refused |= found.refused
                self.found.observed.append(found)
                if not found.ended:
                    self._measure(server, Side.UNPATCHED, number)
        except (LaunchError, ServedError, requests.RequestException) as error:
            raise CertifyError(
                f"the unpatched server cannot be examined, so nothing can be compared: {_reason(error)}"
            ) from error

    def _patched(self, number: int) -> None:
        """Whatever becomes of this server is a result."""
        last = number == self._plan.rounds
        assert self._examination is not None
        what = self._examination.without(self._refused)
        found = Observed(
            Side.PATCHED, number, what.served.stages, what.battery.names, what.battery.names_in_company
        )
        folder = self._folder_of(Side.PATCHED, number)
        try:
            with self._server(Side.PATCHED, number, self._environment(folder)) as server:
                found = observe(server, Side.PATCHED, number, what, times=2, aborts=last)
                if not found.ended:
                    self.found.features = _features(server.log_text()) or self.found.features
                    self._measure(server, Side.PATCHED, number)
                    if self._plan.faults and last:
                        self._say_step(Side.PATCHED, number, "a lost peer")
                        problems = lose_peer(server, what.served, LOSS_LIMIT_S)
                        found = replace(found, lost_peer_problems=problems)
        except (LaunchError, requests.RequestException) as error:
            found = replace(found, ended=found.ended or _reason(error))
        self.found.observed.append(found)

    def _asked(self, server: LaunchedServer) -> Examination:
        """Chosen for the first server; the others are asked the same."""
        if self._examination is None:
            served = ask_served(server)
            self._examination = Examination(served, choose(served))
        return self._examination

    def _server(self, side: Side, number: int, environment: Mapping[str, str]) -> LaunchedServer:
        parts: list[str] = []

        def progress(part: str, seconds: float) -> None:
            if part not in parts:
                parts.append(part)
                self._say_step(side, number, f"{part} ({seconds:.0f} s)")

        return self._launched(self._folder_of(side, number), environment, progress)

    def _launched(
        self,
        folder: Path,
        environment: Mapping[str, str],
        on_progress: Callable[[str, float], None] = lambda part, seconds: None,
    ) -> LaunchedServer:
        return LaunchedServer(
            self._plan.arguments,
            folder,
            environment=environment,
            start_limit_s=self._plan.start_limit_s,
            on_progress=on_progress,
        )

    def _environment(self, folder: Path) -> dict[str, str]:
        trial = {} if self._trial is None else {CERTIFICATES: str(self._trial)}
        return {MODE: "require", **reporting(folder), **trial}

    def _folder_of(self, side: Side, number: int) -> Path:
        return self._folder / f"{side}-{number}"

    def _say_step(self, side: Side, number: int, step: str) -> None:
        self._say(f"round {number} of {self._plan.rounds}, {side} server: {step}")

    # --- measuring --------------------------------------------------------------------------------

    def _measure(self, server: LaunchedServer, side: Side, number: int) -> None:
        if self._plan.speed is None:
            return
        self._say_step(side, number, "speed")
        try:
            self.found.speeds.append(self._speed(server, side, number, self._plan.speed))
        except speed.SpeedError as error:
            self.found.slow.append((f"round {number}", side, str(error)))
            server.check_alive("under load")
        timeline = self._timeline(server) if side is Side.PATCHED else None
        self.found.timeline = timeline or self.found.timeline
        self._say_step(side, number, "idle CPU and memory")
        self.found.resources.append(resources.measure(server.processes(), side, number, timeline))

    def _speed(self, server: LaunchedServer, side: Side, number: int, load: speed.Load) -> Speed:
        arguments = self._plan.arguments
        model = option(arguments, "--model-path") or option(arguments, "--model") or ""
        key = option(arguments, "--api-key")
        served = speed.Served(server.url, model, option(arguments, "--tokenizer-path"), key)
        return speed.measure(load, served, side, number)

    def _timeline(self, server: LaunchedServer) -> Timeline | None:
        try:
            server.dump()
            return resources.read_timeline(server.folder)
        except (LaunchError, ValueError, OSError) as error:
            self._say(f"there is no timeline: {_reason(error)}")
            return None

    def _measure_switches(self, load: speed.Load) -> None:
        """A server for each of the switches, all else as in the patched turns."""
        for number, variant in turns(self._plan.rounds):
            folder = self._folder / f"{variant.name.replace(' ', '-')}-{number}"
            self._say(f"round {number} of {self._plan.rounds}, {variant.name}: speed")
            try:
                environment = {**self._environment(folder), **variant.environment}
                with self._launched(folder, environment) as server:
                    found = self._speed(server, Side.PATCHED, number, load)
                self.found.variants.setdefault(variant.name, []).append(found)
            except (LaunchError, speed.SpeedError) as error:
                where = f"round {number}, {variant.name}"
                self.found.slow.append((where, Side.PATCHED, _reason(error)))


def _features(log: str) -> tuple[str, ...]:
    """What a patched server says that it uses."""
    found = _IN_USE.search(log)
    return tuple(found["features"].split(", ")) if found else ()


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__
