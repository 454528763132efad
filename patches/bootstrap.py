"""Seam: HTTP requests of a disaggregated server to bootstrap servers.

Upstream sends them in the event loop: a decode server asks for the prefill server's layout, a request's rank,
and every sender's address; a prefill server registers the rank. Each call blocks all requests for up to five
seconds, and an unregistered rank is asked for without end. Here `Lookups` asks from its own thread as soon as
a request arrives. With all answers the request joins upstream's handshake: upstream's functions run in the
event loop on canned responses, so one thread still changes all state.

In force on every disaggregated server, with one stage or more, unless its stages stay on upstream's path.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterable
from typing import Any

from sglang_npu_pp.lookups import HttpRequest, LookupFailedError, Lookups, RetryPolicy
from sglang_npu_pp.patching import Patch, with_names
from sglang_npu_pp.settings import load_settings

_QUEUE = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_MANAGER = "sglang.srt.disaggregation.common.conn:CommonKVManager"
_RECEIVER = "sglang.srt.disaggregation.common.conn:CommonKVReceiver"
_SENDER = "sglang.srt.disaggregation.common.conn:CommonKVSender"

_lookups: Lookups | None = None
_failures: dict[int, str] = {}  # bootstrap room -> why its request has to fail
_used: list[HttpRequest] = []  # whose answers the connections of this server now hold


def lookups() -> Lookups:
    """The lookups of this process, created at first use, closed at exit."""
    global _lookups
    if _lookups is None:
        _lookups = Lookups(RetryPolicy(total_s=load_settings().bootstrap_limit_s))
        atexit.register(_lookups.close)
    return _lookups


def set_lookups(replacement: Lookups | None) -> None:
    """For tests. Closes the previous one."""
    global _lookups
    if _lookups is not None:
        atexit.unregister(_lookups.close)
        _lookups.close()
    _lookups = replacement


def resolve_prefill_dp_rank(original: Any, queue: Any, req: Any) -> int | None:
    """The rank of the request once all lookups are answered, else None.

    Upstream calls it when a request arrives: that starts the lookups.
    """
    try:
        return _find_rank(original, queue, req)
    except LookupFailedError as error:
        _failures[req.bootstrap_room] = str(error)
        return None


def resolve_pending_reqs(original: Any, queue: Any) -> None:
    """Upstream's step, for requests with all answers."""
    # Every request waiting for these fails below; a later one starts anew. They are forgotten without
    # any, too: another stage may have failed the request before its lookup ended here.
    failed = [] if _lookups is None else _lookups.failed()
    if not queue.pending_reqs:
        _forget_all(failed)
        original(queue)
        return
    ready: list[Any] = []
    waiting: list[Any] = []
    for decode_req in queue.pending_reqs:
        receiver, req = decode_req.kv_receiver, decode_req.req
        if receiver is None or receiver.conclude_state is not None:
            _forget(req)  # aborted while it waited
            continue
        rank = queue._resolve_prefill_dp_rank(req)
        failure = _failures.pop(req.bootstrap_room, None)
        if failure is not None:
            _fail(queue.kv_manager, receiver, failure)
            _forget(req)
        else:
            (waiting if rank is None else ready).append(decode_req)
    _forget_all(failed)
    queue.pending_reqs = ready
    original(queue)
    for decode_req in ready:
        _forget(decode_req.req)
    while _used:  # a dead connection is looked up again
        lookups().forget(_used.pop())
    queue.pending_reqs = [*waiting, *queue.pending_reqs]


def prefetch_prefill_dp_rank_queries(original: Any, queue: Any) -> None:
    """Nothing: the query was sent when the request arrived."""


def try_ensure_parallel_info(original: Any, manager: Any, address: str) -> bool:
    """Upstream's check of the prefill server's layout, once the answer is there.

    Raises LookupFailedError for a failed lookup, or servers that upstream finds incompatible.
    """
    if address in manager.prefill_info_table:
        return True
    request = _layout_request(address)
    answer = lookups().ask(request)
    if answer is None:
        return False
    lookups().forget(request)
    try:
        usable = with_names(original, requests=_CannedResponse(answer))(manager, address)
    except RuntimeError as error:
        raise LookupFailedError(f"the prefill server of {address} does not fit this one: {error}") from error
    if not usable:
        raise LookupFailedError(f"the bootstrap server {address} described a prefill server as {answer}")
    return True


def get_bootstrap_info_from_server(
    original: Any, receiver: Any, dp_rank: int, cp_rank: int, tp_rank: int, pp_rank: int
) -> Any:
    """Upstream's function on the lookup's answer; None, as upstream for a lost server, without one."""
    request = _rank_request(receiver.bootstrap_addr, dp_rank, cp_rank, tp_rank, pp_rank)
    _used.append(request)
    try:
        answer = _CannedResponse(lookups().ask(request))
    except LookupFailedError:
        answer = _CannedResponse(None)
    asked = with_names(original, requests=answer, _get_bootstrap_session=lambda _: answer)
    return asked(receiver, dp_rank, cp_rank, tp_rank, pp_rank)


def register_prefill_dp_rank(original: Any, sender: Any) -> None:
    """Register the rank of the request, without waiting. On failure the request fails: no decode server could
    find it."""
    manager, room = sender.kv_mgr, sender.bootstrap_room

    def fail(reason: str) -> None:
        if room in manager.request_status:  # else it has ended in the meantime
            manager.record_failure(room, reason)
            manager.update_status(room, _failed_state())

    with_names(original, requests=_DeferredPost(fail))(sender)


def _find_rank(original: Any, queue: Any, req: Any) -> int | None:
    manager, address = queue.kv_manager, _address(req)
    if not manager.try_ensure_parallel_info(address):
        return None
    rank: int | None = original(queue, req)
    if rank is None:
        answer = lookups().ask(_room_request(req))
        if answer is None:
            return None
        rank = int(answer[str(req.bootstrap_room)])
    answers = [lookups().ask(request) for request in _rank_requests(manager, address, rank)]
    return None if None in answers else rank


def _fail(manager: Any, receiver: Any, reason: str) -> None:
    """As in `CommonKVReceiver.init`: the handshake then ends this request only."""
    manager.record_failure(receiver.bootstrap_room, reason)
    receiver.conclude_state = _failed_state()
    manager.update_status(receiver.bootstrap_room, _failed_state())


def _forget_all(requests: Iterable[HttpRequest]) -> None:
    for request in requests:
        lookups().forget(request)


def _forget(req: Any) -> None:
    """Drop the lookups of this request alone."""
    lookups().forget(_room_request(req))
    _failures.pop(req.bootstrap_room, None)


def _failed_state() -> Any:
    from sglang.srt.disaggregation.base.conn import KVPoll

    return KVPoll.Failed


def _address(req: Any) -> str:
    from sglang.srt.disaggregation.decode import _bootstrap_addr

    return _bootstrap_addr(req)


def _layout_request(address: str) -> HttpRequest:
    return HttpRequest(_route(address, -1, -1, -1, -1), expects="pp_size")


def _rank_request(address: str, dp_rank: int, cp_rank: int, tp_rank: int, pp_rank: int) -> HttpRequest:
    return HttpRequest(_route(address, dp_rank, cp_rank, tp_rank, pp_rank), expects="rank_port")


def _room_request(req: Any) -> HttpRequest:
    """A room is registered when the prefill server has the request, possibly later than here."""
    body = json.dumps({"bootstrap_rooms": [req.bootstrap_room]})
    return HttpRequest(f"http://{_address(req)}/query_dp_ranks", body, expects=str(req.bootstrap_room))


def _rank_requests(manager: Any, address: str, dp_rank: int) -> list[HttpRequest]:
    """Requests of `CommonKVReceiver.init` not yet answered for an earlier request."""
    info = manager.prefill_info_table.get(address)
    if info is None:  # its heartbeat has just failed: `init` reports it
        return []
    return [
        _rank_request(address, dp_rank, cp_rank, tp_rank, pp_rank)
        for cp_rank in info.target_cp_ranks
        if f"{address}_{dp_rank}_{cp_rank}_{info.target_tp_rank}" not in manager.connection_pool
        for tp_rank in info.target_tp_ranks
        for pp_rank in info.target_pp_ranks
    ]


def _route(address: str, dp_rank: int, cp_rank: int, tp_rank: int, pp_rank: int) -> str:
    return (
        f"http://{address}/route?prefill_dp_rank={dp_rank}&prefill_cp_rank={cp_rank}"
        f"&target_tp_rank={tp_rank}&target_pp_rank={pp_rank}"
    )


class _CannedResponse:
    """Replaces `requests`, its session, and the response: the answer is already there."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.status_code = 503 if answer is None else 200
        self.text = "the lookup has no answer" if answer is None else json.dumps(answer)

    def get(self, url: str, **_: Any) -> _CannedResponse:
        return self

    def json(self) -> Any:
        return dict(self._answer)


class _DeferredPost:
    """Replaces `requests`, and the response: the lookups send the POST."""

    status_code = 200

    def __init__(self, on_failure: Callable[[str], None]) -> None:
        self._on_failure = on_failure

    def post(self, url: str, json: Any, **_: Any) -> _DeferredPost:
        lookups().send(HttpRequest(url, _as_text(json)), self._on_failure)
        return self


def _as_text(value: Any) -> str:
    return json.dumps(value)


_WHY = "is an HTTP request in the event loop, which blocks every request for up to five seconds"
_UPSTREAM = "vllm-ascend #5303 (asks when scheduling); 0.5.20 and later ask for ranks on a worker, in part"
_PLAN = "goes when upstream asks on a worker"

PATCHES = (
    Patch(
        target=f"{_QUEUE}._resolve_prefill_dp_rank",
        wrapper=resolve_prefill_dp_rank,
        why="a known rank starts the handshake, with HTTP requests for addresses in the event loop",
        how="starts the lookups; returns the rank once the handshake has all its answers",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_QUEUE}.add", "sglang.srt.disaggregation.decode:_bootstrap_addr"),
    ),
    Patch(
        target=f"{_QUEUE}._resolve_pending_reqs",
        wrapper=resolve_pending_reqs,
        why="each of its steps may send HTTP requests; retries count iterations, and some errors have none",
        how="runs for the requests with all answers; a failed lookup fails its request",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_QUEUE}._ensure_prefill_info",
            f"{_QUEUE}._update_handshake_waiters",
            f"{_RECEIVER}.query_prefill_dp_ranks",
        ),
    ),
    Patch(
        target=f"{_QUEUE}.prefetch_prefill_dp_rank_queries",
        wrapper=prefetch_prefill_dp_rank_queries,
        why="would send a second query",
        how="does nothing",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,
    ),
    Patch(
        target=f"{_MANAGER}.try_ensure_parallel_info",
        wrapper=try_ensure_parallel_info,
        why=f"the layout of the prefill server {_WHY}; an incompatible server ends this one",
        how="checks the answer of the lookup; an incompatible server fails the request",
        upstream=_UPSTREAM,
        plan=_PLAN,
    ),
    Patch(
        target=f"{_RECEIVER}._get_bootstrap_info_from_server",
        wrapper=get_bootstrap_info_from_server,
        why=f"the address of each rank {_WHY}",
        how="takes the answer of the lookup",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_RECEIVER}.init",
            f"{_RECEIVER}._setup_bootstrap_infos",
            f"{_MANAGER}.record_failure",
            f"{_MANAGER}.update_status",
        ),
    ),
    Patch(
        target=f"{_SENDER}._register_prefill_dp_rank",
        wrapper=register_prefill_dp_rank,
        why=f"the registration {_WHY}; when it fails, the request waits until it times out",
        how="the lookups send it; when they cannot, the request fails",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_SENDER}.__init__",),
    ),
)
