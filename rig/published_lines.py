"""The published command lines as servers on the simulated Ascend: a prefill server each, of the tiny twin of
its model, and a decode server behind it, which drafts too where that one does, with SGLang's ascend transfer
between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rig import battery
from rig.devices import EAGER
from rig.disaggregated import Pair, arguments
from rig.launcher import RANDOM_MODEL, Launcher
from rig.published_twin import GLM_5_1, GLM_5_2, write_twin
from rig.releases import NEWEST, RELEASES
from rig.server import LAYER_PARTITION_VARIABLE
from rig.sparse_reference import REQUEST, Answer, Reference
from rig.speculation import NEXTN_STEPS, nextn_arguments
from sglang_npu_pp.tools.certify.ports import HOST, free_ports
from sglang_npu_pp.tools.published import CONTEXT_RANKS, Published

DEVICE, BACKEND = "npu-sim", "ascend"

# 0.5.21 calls `rebuild_cp_kv_cache` of an NPU's attention, which is not there any more (sglang #40165).
RELEASE = RELEASES[NEWEST]

LENGTHS = (1, 64, 65, 257, 600)  # of prompts: each takes seconds where idle ranks poll

# Of GLM_5_2's eight layers. As in what is published, every stage begins with a layer that has an indexer.
PARTITIONS = {2: "2,6", 4: "1,1,4,2"}


def serve(
    launcher: Launcher, line: Published, stages: int, *, patched: bool = True
) -> tuple[Mapping[int, Answer], Reference]:
    """Start the servers, ask all prompts one by one, end them. The reference has the same weights."""
    (bootstrap_port,) = free_ports(1)
    config = GLM_5_2 if line.drafts else GLM_5_1
    twin = write_twin(launcher.directory / f"twin{launcher.started}", RANDOM_MODEL, config)
    common: dict[str, Any] = {"device": DEVICE, "model": twin, "release": RELEASE}
    here = {"SGLANG_HOST_IP": HOST}
    uneven = {LAYER_PARTITION_VARIABLE: PARTITIONS[stages]} if line.environment else {}
    prefill = launcher.configure(
        CONTEXT_RANKS,
        stages,
        patched=patched,
        args=(*line.scaled(stages), "--disaggregation-bootstrap-port", str(bootstrap_port)),
        env={**here, **uneven},
        **common,
    )
    reference = Reference(twin, ranks=CONTEXT_RANKS, ranks_behind=1)
    start = launcher.servers.enter_context
    try:
        drafting = nextn_arguments(NEXTN_STEPS["decode"]) if line.drafts else ()
        decoding = (*EAGER, *arguments("decode", bootstrap_port, BACKEND), *drafting)
        decode = start(launcher.configure(1, 1, patched=False, args=decoding, env=here, **common))
        decode.freeze()  # idle ranks poll: the others would start for minutes on two cores
        start(prefill)
        decode.thaw()
        pair = Pair(prefill, decode, bootstrap_port)
        return {length: _ask(pair, length) for length in LENGTHS}, reference
    finally:
        launcher.stop_all()


def _ask(pair: Pair, length: int) -> Answer:
    prompt = battery.prompt(length)
    first, rest = pair.generate({"input_ids": prompt, **REQUEST})
    for answer in (first, rest):
        assert not isinstance(answer, Exception), answer
    return Answer.of(prompt, first, rest)
