"""Variables of HCCL and torch_npu: value, cost, advice. Marks name the basis of a sentence (`MARKS`)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from ...transport.addresses import matching
from .findings import Finding, Level

Environ = Mapping[str, str]
Rule = Callable[[Environ], Finding]

P2P_BUFFER_MB = 20  # P2P_HCCL_BUFFSIZE, its default [vendor]
BUFFER_MB = 200  # HCCL_BUFFSIZE, its default [vendor]
MARKS = (
    "[vendor] Huawei's documentation; [torch_npu] what the 2.13.0 wheel says of itself; [simulated] seen "
    "with that wheel on a simulated CANN; [inferred] not tried. None of it was tried on Ascend hardware"
)
EXPANSION_MODES = ("AI_CPU", "AIV", "HOST", "HOST_TS")
_TRUE = {"1", "true", "yes", "y"}


def check(environ: Environ) -> list[Finding]:
    """A finding for each variable, set or not; the last explains the marks."""
    return [*(rule(environ) for rule in RULES), Finding(Level.NOTE, "marks", MARKS)]


def pair_group_mb(environ: Environ) -> int:
    """Device memory (MB) of a neighbour pair's group, on each of its two ranks.

    A communicator takes twice its buffer. P2P has one of its own unless P2P_HCCL_BUFFSIZE is 0; then it
    shares the group's, with HCCL_BUFFSIZE [vendor]. Raises ValueError for an invalid size.
    """
    own = _megabytes(environ, "P2P_HCCL_BUFFSIZE", P2P_BUFFER_MB, least=0)
    return 2 * (own or _megabytes(environ, "HCCL_BUFFSIZE", BUFFER_MB, least=1))


def _megabytes(environ: Environ, name: str, default: int, least: int) -> int:
    text = environ.get(name, "") or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r} must be a whole number of MB, at least {least}.")
    return int(text)


def _shown(environ: Environ, name: str, default: str) -> str:
    text = environ.get(name)
    return text or f"not set, so {default}"


# --- memory --------------------------------------------------------------------------------------


def _p2p_buffer(environ: Environ) -> Finding:
    name = "P2P_HCCL_BUFFSIZE"
    try:
        each = pair_group_mb(environ)
    except ValueError as error:
        return Finding(Level.WRONG, name, str(error))
    shown = _shown(environ, name, f"{P2P_BUFFER_MB} MB")
    cost = (
        f"{shown}; the proxies of a pair of neighbour stages have a communicator of their own, which takes "
        f"{each} MB of device memory on each of its ranks: {each} MB on the first and the last stage, "
        f"{2 * each} MB between [vendor]"
    )
    if environ.get(name) == "0":
        return Finding(
            Level.WARNING,
            name,
            f"{cost}. 0 makes P2P use the large buffers of HCCL_BUFFSIZE; unset it, or set it to 20.",
        )
    return Finding(Level.OK, name, cost)


def _buffer(environ: Environ) -> Finding:
    name = "HCCL_BUFFSIZE"
    try:
        each = 2 * _megabytes(environ, name, BUFFER_MB, least=1)
    except ValueError as error:
        return Finding(Level.WRONG, name, str(error))
    return Finding(
        Level.OK,
        name,
        f"{_shown(environ, name, f'{BUFFER_MB} MB')}; every other communicator (tensor parallel, pipeline, "
        f"world) takes twice that, {each} MB [vendor]. Collectives of more bytes get slower; this package "
        "adds none of this size (2 x 50 MB with data-parallel attention)",
    )


def _memory_reuse(environ: Environ) -> Finding:
    name = "MULTI_STREAM_MEMORY_REUSE"
    if (environ.get(name) or "1") not in ("0", "1", "2", "3"):
        return Finding(
            Level.WRONG, name, f"{environ[name]} is refused by torch_npu: it must be 0, 1, 2 or 3."
        )
    return Finding(
        Level.OK,
        name,
        f"{_shown(environ, name, '1')}; 1 erases recordStream [vendor], which nothing here relies on: "
        "buffers in flight are kept by reference until their event has passed [simulated]",
    )


def _allocator(environ: Environ) -> Finding:
    name = "PYTORCH_NPU_ALLOC_CONF"
    text = environ.get(name, "")
    parts = [part.strip() for part in text.split(",")]
    if "pin_memory_expandable_segments:True" in parts:
        return Finding(
            Level.WARNING,
            name,
            f"{text}; pinned memory from expandable segments and captured graphs do not go together "
            "[torch_npu], and token ids come home through pinned memory; remove "
            "pin_memory_expandable_segments.",
        )
    expandable = "expandable_segments:True" in parts
    if expandable and any(part.startswith(("max_split_size_mb", "garbage_collection")) for part in parts):
        return Finding(
            Level.WARNING,
            name,
            f"{text}; torch_npu refuses max_split_size_mb and garbage_collection_threshold beside expandable "
            "segments; remove one of them.",
        )
    if expandable:
        return Finding(Level.OK, name, text)
    return Finding(
        Level.NOTE,
        name,
        f"{_shown(environ, name, 'no expandable segments')}; expandable_segments:True fragments less",
    )


def _caching(environ: Environ) -> Finding:
    name = "PYTORCH_NO_NPU_MEMORY_CACHING"
    if environ.get(name):
        return Finding(
            Level.WARNING, name, "set: every allocation waits for the driver, for debugging only; unset it."
        )
    return Finding(Level.OK, name, "not set")


# --- time ----------------------------------------------------------------------------------------


def _connect_timeout(environ: Environ) -> Finding:
    name = "HCCL_CONNECT_TIMEOUT"
    text = environ.get(name, "") or "120"
    if not text.isdecimal() or not 120 <= int(text) <= 7200:
        return Finding(
            Level.WRONG, name, f"{text!r} must be a whole number of seconds from 120 to 7200 [vendor]."
        )
    shown = _shown(environ, name, "120 s")
    if int(text) < 300:
        return Finding(
            Level.NOTE,
            name,
            f"{shown}; communicators are made when they are first used, and a rank waits so long for the "
            "other one. Those of this package are made at start; for those of SGLang torch_npu recommends "
            "300 s or more.",
        )
    return Finding(Level.OK, name, shown)


def _exec_timeout(environ: Environ) -> Finding:
    name = "HCCL_EXEC_TIMEOUT"
    text = environ.get(name, "") or "1836"
    if not text.isdecimal():
        return Finding(Level.WRONG, name, f"{text!r} must be a whole number of seconds.")
    shown = _shown(environ, name, "1836 s")
    if int(text) == 0:
        return Finding(
            Level.WARNING, name, f"{shown}: a collective waits for a dead rank for ever; unset it."
        )
    if int(text) < 600:
        return Finding(
            Level.WARNING,
            name,
            f"{shown}: a send or collective that waits longer for its partner fails, and compiling or "
            "loading may take that long; a lost stage is noticed by SGLANG_NPU_PP_PEER_TIMEOUT_S anyway. "
            "Raise or unset it.",
        )
    return Finding(
        Level.OK,
        name,
        f"{shown}; HCCL itself notices a dead rank only then, the host lane of this package after "
        "SGLANG_NPU_PP_PEER_TIMEOUT_S",
    )


# --- how work is launched ------------------------------------------------------------------------


def _launch_blocking(environ: Environ) -> Finding:
    name = "ASCEND_LAUNCH_BLOCKING"
    if environ.get(name, "0") in ("", "0"):
        return Finding(Level.OK, name, _shown(environ, name, "off"))
    return Finding(
        Level.WARNING,
        name,
        "on: the task queue is off and every launch waits [vendor], so nothing overlaps, and a send that is "
        "posted before its receive may wait for ever [inferred]; unset it.",
    )


def _task_queue(environ: Environ) -> Finding:
    name = "TASK_QUEUE_ENABLE"
    text = environ.get(name) or "1"
    if text not in ("0", "1", "2"):
        return Finding(Level.WRONG, name, f"{text!r} is refused by torch_npu: it must be 0, 1 or 2.")
    if text == "0":
        return Finding(
            Level.WARNING, name, "0: the scheduler launches every operator itself; unset it, or set it to 1."
        )
    if text == "2":
        return Finding(
            Level.NOTE,
            name,
            "2: not possible while graphs are captured [torch_npu]; with NPU graphs set it to 1.",
        )
    return Finding(Level.OK, name, _shown(environ, name, "1"))


def _blocking_wait(environ: Environ) -> Finding:
    for name in ("TORCH_HCCL_BLOCKING_WAIT", "HCCL_BLOCKING_WAIT"):
        if environ.get(name, "").lower() in _TRUE:
            return Finding(
                Level.WARNING,
                name,
                "on: every wait for the device lane blocks the scheduler instead of a stream; unset it.",
            )
    return Finding(Level.OK, "HCCL_BLOCKING_WAIT", "off")


def _expansion_mode(environ: Environ) -> Finding:
    name = "HCCL_OP_EXPANSION_MODE"
    text = environ.get(name, "")
    if text and text not in EXPANSION_MODES:
        return Finding(
            Level.WARNING, name, f"{text!r} is none of {', '.join(EXPANSION_MODES)}: HCCL ignores it."
        )
    return Finding(
        Level.OK,
        name,
        f"{_shown(environ, name, 'as the product has it')}; where HCCL runs its algorithms. AIV is what "
        "serving guides use on A2 and A3; it must be equal on all ranks. This package does not depend on it "
        "[inferred]",
    )


# --- where it connects ---------------------------------------------------------------------------


def _interface(name: str, means: Callable[[str, list[str]], list[str]]) -> Rule:
    def rule(environ: Environ) -> Finding:
        text = environ.get(name, "").strip()
        if not text:
            return Finding(
                Level.NOTE,
                name,
                "not set; with several interfaces and nodes name the one between the nodes",
            )
        here = [interface for _, interface in socket.if_nameindex()]
        if means(text, here):
            return Finding(Level.OK, name, text)
        return Finding(
            Level.WRONG, name, f"{text!r} is no interface of this machine, which has {', '.join(here)}."
        )

    return rule


def _exactly(text: str, interfaces: list[str]) -> list[str]:
    """Gloo: whole names, separated by commas, all existing."""
    names = [part.strip() for part in text.split(",")]
    return names if set(names) <= set(interfaces) else []


RULES: tuple[Rule, ...] = (
    _p2p_buffer,
    _buffer,
    _memory_reuse,
    _allocator,
    _caching,
    _connect_timeout,
    _exec_timeout,
    _launch_blocking,
    _task_queue,
    _blocking_wait,
    _expansion_mode,
    _interface("HCCL_SOCKET_IFNAME", matching),
    _interface("GLOO_SOCKET_IFNAME", _exactly),
)
