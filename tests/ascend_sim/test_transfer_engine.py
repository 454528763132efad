"""The stand-in for the engine that moves caches: from this process into another one, and back."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ascend_sim.sglang_on_sim.transfer_engine import FAILED, OK, PIECES, TransferEngine

pytestmark = pytest.mark.thorough

LIMIT_S = 30.0
SIZE = 2 * PIECES
# Says where its memory is, and at the end of its input what is in it.
OTHER = f"""
import ctypes, sys
from ascend_sim.sglang_on_sim.transfer_engine import TransferEngine
engine, memory = TransferEngine(), (ctypes.c_ubyte * {SIZE})()
print(engine.get_rpc_port(), ctypes.addressof(memory), flush=True)
sys.stdin.read()
print(bytes(memory).hex())
"""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def opened(other: subprocess.Popen[str]) -> tuple[str, int]:
    """Its session, and the address of its memory."""
    assert other.stdout is not None
    port, address = other.stdout.readline().split()
    return f"127.0.0.1:{port}", int(address)


def test_pieces_arrive_where_they_should(other: subprocess.Popen[str]) -> None:
    """More of them than one call of the kernel takes, in any order."""
    session, target = opened(other)
    engine, memory = TransferEngine(), (ctypes.c_ubyte * SIZE)(*(n % 251 for n in range(SIZE)))
    source = ctypes.addressof(memory)
    engine.batch_register_memory([source], [SIZE])
    places = range(SIZE - 1, -1, -1)
    sources, targets = [source + n for n in places], [target + n for n in places]
    assert engine.batch_transfer_sync_write(session, sources, targets, [1] * SIZE) == OK
    found, _ = other.communicate(timeout=LIMIT_S)
    assert bytes.fromhex(found) == bytes(memory)


def test_memory_that_is_not_registered_stays(other: subprocess.Popen[str]) -> None:
    session, target = opened(other)
    engine, memory = TransferEngine(), (ctypes.c_ubyte * SIZE)(*[1] * SIZE)
    source = ctypes.addressof(memory)
    engine.batch_register_memory([source], [SIZE - 1])
    assert engine.batch_transfer_sync_write(session, [source], [target], [SIZE]) == FAILED
    found, _ = other.communicate(timeout=LIMIT_S)
    assert not any(bytes.fromhex(found))


def test_a_session_of_a_process_that_ended_fails(other: subprocess.Popen[str]) -> None:
    session, target = opened(other)
    other.communicate(timeout=LIMIT_S)
    engine, memory = TransferEngine(), (ctypes.c_ubyte * SIZE)()
    source = ctypes.addressof(memory)
    engine.batch_register_memory([source], [SIZE])
    assert engine.batch_transfer_sync_write(session, [source], [target], [SIZE]) == FAILED
