"""Seam: the store in which the stages of a prefill server note how far transfers are (from 0.5.22 on).

Later stages send their notes to stage 0 over TCP, at an address of the network and without authentication:
any client that finds the port decides with them which requests go on. Here both ends have the keys of the
host lane, which stages exchange when they start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from sglang_npu_pp.patching import Patch, with_names
from sglang_npu_pp.transport.endpoints import KnownKeys

from .pipeline import current

_STORE = "sglang.srt.disaggregation.pp_consensus_store:PPConsensusStore"
_AUTHENTICATOR = "sglang_npu_pp_authenticator"  # attribute of the store of stage 0


class _Context:
    """A ZeroMQ context whose sockets have options before anything else happens to them."""

    def __init__(self, context: zmq.Context, options: Mapping[Any, int | bytes]) -> None:
        self._context, self._options = context, options

    def socket(self, kind: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        for option, value in self._options.items():
            socket.setsockopt(option, value)
        return socket


def init_zmq(original: Any, store: Any) -> None:
    """Stage 0 listens, the others connect."""
    from sglang.srt.disaggregation import pp_consensus_store as upstream

    lane = current().link.host_lane

    def listen(context: zmq.Context, *arguments: Any, **options: Any) -> tuple[int, zmq.Socket]:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve_callback("*", KnownKeys(*lane.known_keys))
        setattr(store, _AUTHENTICATOR, authenticator)
        keys: dict[Any, int | bytes] = {zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: lane.keys.secret}
        return upstream.get_zmq_socket_on_host(_Context(context, keys), *arguments, **options)

    def connect(context: zmq.Context, *arguments: Any, **options: Any) -> zmq.Socket:
        keys: dict[Any, int | bytes] = {
            zmq.CURVE_PUBLICKEY: lane.keys.public,
            zmq.CURVE_SECRETKEY: lane.keys.secret,
            zmq.CURVE_SERVERKEY: lane.key_of(0),
        }
        return upstream.get_zmq_socket(_Context(context, keys), *arguments, **options)

    with_names(original, get_zmq_socket_on_host=listen, get_zmq_socket=connect)(store)


def close(original: Any, store: Any) -> None:
    """Upstream's ends the context, which waits for all sockets in it."""
    authenticator = getattr(store, _AUTHENTICATOR, None)
    if authenticator is not None:
        authenticator.stop()
    original(store)


_UPSTREAM = "sglang PPConsensusStore (0.5.22), which takes no pickles because it is not authenticated"
_PLAN = "goes when upstream authenticates its sockets between stages"

PATCHES = (
    Patch(
        target=f"{_STORE}._init_zmq",
        wrapper=init_zmq,
        why="a client that reaches stage 0's port changes which requests the stages take for transferred",
        how="CURVE on both ends, with the keys of the host lane",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,  # from 0.5.22 on
    ),
    Patch(
        target=f"{_STORE}.close",
        wrapper=close,
        why="would wait for ever for the socket of the authentication",
        how="ends that first",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,
    ),
)
