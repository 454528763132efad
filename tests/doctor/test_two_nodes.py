"""The link test as two operators run it: two commands, in two network namespaces, over an emulated link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.link import EmulatedLink, reason_for_loopback
from sglang_npu_pp.tools.doctor.link_test import LinkReport

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_for_loopback()), reason=reason_for_loopback()),
]

LIMIT_S = 120
DELAY_MS = 5
PORT = 5001


def alone(work: Callable[[], Any]) -> Any:
    """In a thread of its own, which ends: a link moves the thread that makes it into a namespace."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(LIMIT_S)


def doctor(
    link: EmulatedLink, node: int, *options: str, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    command = [*link.prefix(node), sys.executable, "-m", "sglang_npu_pp", "doctor", "--json", *options]
    return subprocess.Popen(
        command,
        env={**os.environ, **link.variables(node), **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_both_nodes_measure_the_delay_of_the_link(tmp_path: Path) -> None:
    """The command of the second node is read from the first one's output and run letter by letter."""

    def run() -> tuple[dict[str, Any], str]:
        with EmulatedLink(tmp_path) as link:
            link.set(DELAY_MS, 0)
            options = ("--forward-ms", "5", "--limit", "60")
            listener = doctor(link, 0, "--listen", f"{link.master}:{PORT}", *options)
            try:
                assert listener.stderr is not None
                listener.stderr.readline()
                printed = listener.stderr.readline().strip()
                assert f"--peer {link.master}:{PORT} --key " in printed
                return answer_after(listener, link, printed)
            finally:
                listener.kill()

    section, table = alone(run)
    data = section["data"]
    assert data["one_way_s"] >= DELAY_MS / 1e3
    assert data["depth_by_forward_ms"] == {"5": LinkReport(2 * data["one_way_s"], 0, 0, 0).depth(5, 2)}
    assert data["depth_by_forward_ms"]["5"] >= 2  # depth * 5 ms / 2 stages >= 5 ms
    assert f"one way {1e3 * data['one_way_s']:.3f} ms" in table, "the other side saw the same"
    assert "Nothing is wrong" in table


def answer_after(
    listener: subprocess.Popen[str], link: EmulatedLink, printed: str
) -> tuple[dict[str, Any], str]:
    """What the listener found, and what the command that it printed says on the other node."""
    assert printed.startswith("python -m sglang_npu_pp doctor --peer ")
    done = subprocess.run(
        [*link.prefix(1), "sh", "-c", f"{sys.executable} {printed.removeprefix('python ')}"],
        env={**os.environ, **link.variables(1)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    output, error = listener.communicate(timeout=LIMIT_S)
    assert listener.returncode == 0, output + error
    return json.loads(output)["sections"][-1], done.stdout


DECOY = "10.80.0.1"  # of node 0, on its loopback: node 1 does not reach it
IPV6 = ("fd00:79::1", "fd00:79::2")


@pytest.mark.parametrize(
    ("environ", "listen"),
    [
        ({"GLOO_SOCKET_IFNAME": "lo", "HOST_IP": DECOY}, str(PORT)),
        pytest.param(
            {"SGLANG_NPU_PP_HOST": "pplink", "HOST_IP": "192.0.2.99"},
            f"pplink:{PORT}",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"SGLANG_NPU_PP_HOST": "0.0.0.0", "HCCL_SOCKET_IFNAME": "=lo"},
            f"0.0.0.0:{PORT}",
            marks=pytest.mark.thorough,
        ),
        pytest.param({"SGLANG_NPU_PP_HOST": IPV6[0]}, f"[{IPV6[0]}]:{PORT}", marks=pytest.mark.thorough),
    ],
    ids=["wrong interface of gloo", "an interface", "every address", "IPv6"],
)
def test_the_lane_comes_up_at_an_address_that_the_other_node_reaches(
    tmp_path: Path, environ: dict[str, str], listen: str
) -> None:
    def run() -> tuple[dict[str, Any], str]:
        with EmulatedLink(tmp_path) as link:
            decoy = ["ip", "addr", "add", f"{DECOY}/32", "dev", "lo"]
            subprocess.run([*link.prefix(0), *decoy], check=True, timeout=LIMIT_S)
            for node, address in enumerate(IPV6):
                more = ["ip", "addr", "add", f"{address}/64", "dev", "pplink", "nodad"]
                subprocess.run([*link.prefix(node), *more], check=True, timeout=LIMIT_S)
            listener = doctor(link, 0, "--listen", listen, "--limit", "60", environ=environ)
            try:
                assert listener.stderr is not None
                listener.stderr.readline()
                printed = listener.stderr.readline().strip()
                dialled = listen if listen.startswith("[") else f"{link.master}:{PORT}"
                return answer_after(listener, link, re.sub(r"--peer \S+", f"--peer {dialled}", printed))
            finally:
                listener.kill()

    section, table = alone(run)
    assert section["data"]["one_way_s"] > 0
    address = f"[{IPV6[0]}]" if listen.startswith("[") else "10.79.0.1"
    assert f"the other node answers at tcp://{address}:" in " ".join(table.split())
    assert "Nothing is wrong" in table
