"""Real ranks for tests: processes that keep their lanes and run the functions they are sent.

A `Team` holds a few rank processes for a whole test session, because a process that imports torch takes
seconds to start. A test sends a rank a function of its own module; the function gets the rank's `Here`
and runs in that process, over real sockets and real process groups. Every call has a limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from rig.samples import assert_same, realise
from sglang_npu_pp.observe.telemetry import Telemetry
from sglang_npu_pp.observe.trace import Event, Trace
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import PassedEvent
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.device_lane import DeviceLane, create_neighbour_groups
from sglang_npu_pp.transport.endpoints import Exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import Kind, Message
from sglang_npu_pp.transport.stage_link import StageLink

CALL_LIMIT_S = 90.0  # a first call may import SGLang, on a busy machine
AFTER_ERROR_S = 5.0
START_LIMIT_S = 120.0
GROUP_LIMIT = timedelta(seconds=60)

Result = TypeVar("Result")


def store_exchange(store: Any, round_name: str, stage: int, stages: int) -> Exchange:
    """An `Exchange` over a key-value store. Unlike a process group it does not mind a rank that dies."""
    calls = 0

    def exchange(data: bytes) -> list[bytes]:
        nonlocal calls
        calls += 1
        store.set(f"{round_name}/{calls}/{stage}", data.hex())
        return [bytes.fromhex(store.get(f"{round_name}/{calls}/{s}").decode()) for s in range(stages)]

    return exchange


# --- in the rank's process ---------------------------------------------------------------------


@dataclass
class Here:
    """What a rank process keeps from one call to the next."""

    index: int
    store: Any
    device: torch.device = torch.device("cpu")  # of the tensors that the device lane carries
    lane: HostLane = field(init=False)
    link: StageLink = field(init=False)
    telemetry: Telemetry = field(init=False)
    trace: Trace = field(init=False)
    opened: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    closers: list[Callable[[], None]] = field(default_factory=list)  # what must end before the lane does
    note: Callable[[Any], None] = lambda value: None
    """Tells the test something while the call goes on."""


def open_host_lane(
    here: Here,
    round_name: str,
    stage: int,
    stages: int,
    settings: Settings,
    node: str | None = None,
    port: int = 0,
    extra_ports: Mapping[str, Sequence[int]] | None = None,
    wrap_exchange: Callable[[Here, Exchange], Exchange] | None = None,
) -> None:
    """Make and open this rank's lane.

    `node`: stand in for another machine of that name. `extra_ports`: name -> the stages that send on it;
    their outboxes are kept under that name.
    """
    close_lanes(here)
    exchange = store_exchange(here.store, round_name, stage, stages)
    if wrap_exchange is not None:
        exchange = wrap_exchange(here, exchange)
    here.telemetry = Telemetry(stage, rank=0)
    here.trace = Trace(enabled=True)
    context = RankContext(stage, stages, 0, settings, here.telemetry, here.trace)
    here.lane = HostLane(context, port=port)
    with _standing_on(node):
        here.lane.open(exchange)
    for name, senders in (extra_ports or {}).items():
        here.kept[name] = here.lane.open_port(name, senders)
        here.closers += [outbox.close for outbox in here.kept[name].values()]
    here.lane.seal()
    here.link = StageLink(here.lane, None)
    here.opened = True


@contextlib.contextmanager
def _standing_on(node: str | None) -> Iterator[None]:
    from sglang_npu_pp.transport import host_lane

    original = host_lane.node_identity
    if node is not None:
        host_lane.node_identity = lambda: node
    try:
        yield
    finally:
        host_lane.node_identity = original


def open_device_lane(here: Here, ranks: Sequence[int], stage: int, slots: int, slot_bytes: int = 0) -> None:
    """Add a device lane over the team's process group to an open link."""
    if not dist.is_initialized():
        raise AssertionError("the team has no process group; Team(..., process_group=True)")
    previous, following = create_neighbour_groups(ranks, stage)
    lane = DeviceLane(
        here.lane.context,
        here.device,
        previous=previous,
        following=following,
        slots=slots,
        slot_bytes=slot_bytes,
    )
    lane.warm_up()
    here.link = StageLink(here.lane, lane)


def keep_pace(here: Here, rank: int) -> None:
    """Make as many groups as the ranks that open a device lane: torch wants equally many everywhere."""
    create_neighbour_groups([rank], 0)


def close_lanes(here: Here) -> None:
    here.kept.clear()
    while here.closers:
        here.closers.pop()()
    if here.opened:
        here.opened = False
        here.lane.close()


def join_process_group(here: Here, round_name: str, world_size: int, device_type: str) -> None:
    """Over gloo for CPU tensors, over HCCL for those of a (simulated) NPU."""
    here.device = torch.device(device_type if device_type == "cpu" else f"{device_type}:{here.index}")
    if device_type == "npu":
        torch.get_device_module(here.device).set_device(here.device)
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "hccl",
        store=dist.PrefixStore(round_name, here.store),
        rank=here.index,
        world_size=world_size,
        timeout=GROUP_LIMIT,
    )


def _serve(index: int, port: int, connection: Connection, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # a test that ran into its limit asks where we are
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=GROUP_LIMIT)
    here = Here(index, store, note=lambda value: connection.send(("note", value)))
    connection.send(("ready", None))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        function, args, kwargs = request
        try:
            answer = ("result", function(here, *args, **kwargs))
        except BaseException as error:
            error.add_note(f"in rank process {index}:\n{traceback.format_exc()}")
            answer = ("error", error)
        try:
            connection.send(answer)
        except OSError:
            return
        except Exception as error:  # the answer cannot be pickled
            connection.send(("error", TypeError(f"{answer!r} cannot be returned to the test: {error}")))


# --- in the test's process ---------------------------------------------------------------------


class Call(Generic[Result]):
    """A function that runs in a rank's process."""

    def __init__(self, rank: Rank, name: str) -> None:
        self.rank, self._name = rank, name

    @property
    def has_answer(self) -> bool:
        """Whether a note or the result is there."""
        return self.rank.has_answer

    def result(self, limit_s: float = CALL_LIMIT_S) -> Result:
        """What the function returned; its exception is raised here."""
        tag, value = self.rank.receive(self._name, limit_s)
        assert tag != "note", f"rank {self.rank.index} sent the note {value!r}, which nobody expected"
        if tag == "error":
            raise value
        result: Result = value
        return result

    def note(self, limit_s: float = CALL_LIMIT_S) -> Any:
        """The next value that the function sends with `here.note`."""
        tag, value = self.rank.receive(f"a note of {self._name}", limit_s)
        if tag == "error":
            raise value
        assert tag == "note", f"{self._name} returned {value!r} without a note"
        return value


class Rank:
    """The test's handle of one rank process."""

    def __init__(self, index: int, port: int, environment: Mapping[str, str]) -> None:
        self.index = index
        self.failed = False
        self._unanswered = 0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(index, port, theirs, environment), name=f"rank-{index}", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def has_answer(self) -> bool:
        return self._connection.poll(0)

    def start(
        self,
        function: Callable[..., Result],
        *args: Any,
        **kwargs: Any,
    ) -> Call[Result]:
        """Begin `function(here, *args, **kwargs)` over there."""
        assert not self.failed, f"rank process {self.index} has failed before"
        try:
            self._connection.send((function, args, kwargs))
        except BrokenPipeError:
            self.failed = True
            raise AssertionError(f"rank process {self.index} has ended: {self._process}") from None
        self._unanswered += 1
        return Call(self, getattr(function, "__name__", str(function)))

    def call(
        self,
        function: Callable[..., Result],
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        """`function(here, *args, **kwargs)` over there, and its result here."""
        return self.start(function, *args, **kwargs).result()

    def receive(self, what: str, limit_s: float) -> tuple[str, Any]:
        if not self._connection.poll(limit_s):
            self.failed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
            raise AssertionError(f"rank process {self.index}: no {what} within {limit_s:g} s")
        try:
            tag, value = self._connection.recv()
        except EOFError:
            self.failed = True
            self._process.join(CALL_LIMIT_S)
            raise AssertionError(f"rank process {self.index} ended before {what}: {self._process}") from None
        self._unanswered -= tag in ("result", "error")
        return tag, value

    def drain(self) -> None:
        """Drop the answers that a failed test did not wait for."""
        while self._unanswered:
            self.receive("end of the calls of the last test", CALL_LIMIT_S)

    def await_end(self) -> None:
        """Wait until the process has ended."""
        ended = wait([self._process.sentinel], timeout=CALL_LIMIT_S)
        assert ended, f"rank process {self.index} did not end within {CALL_LIMIT_S:g} s"

    def kill(self) -> None:
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self._process.join(CALL_LIMIT_S)
        self._connection.close()


class Team:
    """Rank processes, the first `stages` of which open lanes together as often as a test wants."""

    def __init__(
        self,
        size: int,
        *,
        process_group: bool = False,
        environment: Mapping[str, str] | None = None,
        device_type: str = "cpu",
    ) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=GROUP_LIMIT)
        self._environment = {"OMP_NUM_THREADS": "1", **(environment or {})}
        self._rounds = 0
        self.ranks = [Rank(index, self.store.port, self._environment) for index in range(size)]
        for rank in self.ranks:
            assert rank.receive("start", START_LIMIT_S)[0] == "ready"
        if process_group:
            self.each(join_process_group, "world", size, device_type)

    def each(
        self,
        function: Callable[..., Result],
        *args: Any,
        **kwargs: Any,
    ) -> list[Result]:
        """The same call in every process at the same time."""
        return results([rank.start(function, *args, **kwargs) for rank in self.ranks])

    def recruit(self) -> Rank:
        """One more process, for a test that is going to kill it."""
        rank = Rank(len(self.ranks), self.store.port, self._environment)
        assert rank.receive("start", START_LIMIT_S)[0] == "ready"
        self.ranks.append(rank)
        return rank

    def dismiss(self, rank: Rank) -> None:
        self.ranks.remove(rank)
        rank.kill()

    def new_round(self) -> str:
        """A name that no earlier exchange on the store has used."""
        self._rounds += 1
        return f"round-{self._rounds}"

    def open_lanes(
        self,
        stages: int | Sequence[Rank],
        settings: Settings | None = None,
        *,
        nodes: Mapping[int, str] | None = None,
        ports: Mapping[int, int] | None = None,
        extra_ports: Mapping[str, Sequence[int]] | None = None,
    ) -> list[Rank]:
        """Open a host lane in the first `stages` ranks (or in those given), and return them.

        `nodes` lets a stage stand on another machine of that name, `ports` gives it a fixed TCP port.
        `extra_ports`: see `open_host_lane`.
        """
        chosen = self.ranks[:stages] if isinstance(stages, int) else list(stages)
        name = self.new_round()
        results(
            [
                rank.start(
                    open_host_lane,
                    name,
                    stage,
                    len(chosen),
                    settings or Settings(wait_limit_s=20),
                    (nodes or {}).get(stage),
                    (ports or {}).get(stage, 0),
                    extra_ports,
                )
                for stage, rank in enumerate(chosen)
            ]
        )
        return chosen

    def open_links(
        self,
        stages: int,
        settings: Settings | None = None,
        *,
        slots: int = 4,
        slot_bytes: int = 0,
        arrival: Sequence[int] | None = None,
    ) -> list[Rank]:
        """Host lanes and between neighbours a device lane; the stages begin in the order of `arrival`."""
        chosen = self.open_lanes(stages, settings)
        indices = [rank.index for rank in chosen]
        calls = [
            chosen[stage].start(open_device_lane, indices, stage, slots, slot_bytes)
            for stage in arrival or range(stages)
        ]
        calls += [rank.start(keep_pace, rank.index) for rank in self.ranks if rank not in chosen]
        results(calls)
        return chosen

    def open_columns(self, slots: int | None = None) -> None:
        """Of four ranks, tp 2 on two stages: host lanes between ranks 0 and 2 and between ranks 1 and 3; with
        `slots` device lanes, too."""
        for first in (0, 1):
            self.open_lanes([self.ranks[first], self.ranks[first + 2]])
        if slots is not None:
            places = [(rank, rank.index % 2, rank.index // 2) for rank in self.ranks]
            results([rank.start(open_device_lane, [c, c + 2], stage, slots) for rank, c, stage in places])

    @property
    def usable(self) -> bool:
        return not any(rank.failed for rank in self.ranks)

    def reset(self) -> None:
        """Close every lane, so that the next test starts from nothing."""
        for rank in self.ranks:
            rank.drain()
        self.each(close_lanes)

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()


def results(calls: Sequence[Call[Any]], limit_s: float = CALL_LIMIT_S) -> list[Any]:
    """The results of calls that run at the same time.

    Raises the first error, when all have ended; who waits for the one that failed has a few seconds.
    """
    collected: list[Any] = []
    errors: list[BaseException] = []
    for call in calls:
        try:
            collected.append(call.result(AFTER_ERROR_S if errors else limit_s))
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return collected


class TeamKeeper:
    """Gives tests one team after another: the same one as long as it is sound."""

    def __init__(self, start: Callable[[], Team]) -> None:
        self._start = start
        self._team: Team | None = None

    def team(self) -> Team:
        if self._team is not None and not self._team.usable:
            self.close()
        if self._team is None:
            self._team = self._start()
        return self._team

    def after_test(self) -> None:
        """Close lanes. A team that cannot even do that is replaced before the next test."""
        if self._team is None or not self._team.usable:
            return
        try:
            self._team.reset()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._team is not None:
            self._team.close()
            self._team = None


# --- functions that many tests run in a rank's process -----------------------------------------


def send(here: Here, peer: int, kind: Kind, *values: Any, **place: Any) -> int:
    """Push one message a value; returns how many. `place`: slot and iteration."""
    for value in values:
        here.lane.send(peer, Message(kind, values=value, **place))
    return len(values)


def receive(here: Here, source: int, kind: Kind, numbers: range, limit_s: float | None = None) -> list[Any]:
    """Take the messages with these numbers and return their values."""
    return [take_number(here, source, kind, number, limit_s).values for number in numbers]


def take_number(here: Here, source: int, kind: Kind, number: int, limit_s: float | None = None) -> Message:
    """Wait for a message by its number, in any order."""
    channel = here.lane.channel(source, kind)
    for _ in here.lane.wait_steps(channel, number, limit_s):
        pass
    return channel.take(number)


def push_dict(here: Here, kind: Kind, peer: int, values: Mapping[str, Any], **place: Any) -> None:
    """Push a tensor dict; samples in it become tensors. `place`: slot and iteration."""
    here.link.push_tensors(kind, peer, realise(values), **place)


def take_dict(here: Here, kind: Kind, source: int, values: Mapping[str, Any], **place: Any) -> None:
    """Take the next tensor dict of a channel, compare it with what was sent, and free its slot."""
    found = here.link.post(kind, source, **place).wait()
    assert_same(found, realise(values), kind.label)
    here.link.release(PassedEvent())


def await_message(here: Here, source: int, kind: Kind, number: int) -> None:
    """Return when a message has arrived, without taking it."""
    deadline = time.monotonic() + CALL_LIMIT_S / 2
    channel = here.lane.channel(source, kind)
    while number not in channel.waiting:
        assert time.monotonic() < deadline, f"{kind.label} message {number} of stage {source} is not here"
        here.lane.poll(100)


def trace_of(here: Here) -> list[Event]:
    return here.trace.events()


def telemetry_of(here: Here) -> Telemetry:
    return here.telemetry


def announce_blocking(here: Here, peer: int) -> None:
    """From now on a send to `peer` that finds its window full sends the note "blocked" and then waits."""
    outbox = here.lane._outboxes[peer]
    original = outbox._wait_for_room

    @functools.wraps(original)
    def noted(*args: Any) -> None:
        here.trace.record("blocked")
        here.note("blocked")
        original(*args)

    setattr(outbox, "_wait_for_room", noted)  # noqa: B010
