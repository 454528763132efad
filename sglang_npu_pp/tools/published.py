"""The ten command lines with stages that SGLang's repositories publish and time on Ascend.

All start a prefill server of GLM-5.1 or GLM-5.2 (W4A8): tp 4, pp 4 or 8, context parallelism within a stage,
experts over DeepEP. Five stand in sgl-project/sglang, five in Ascend/sglang, where GLM-5.2 drafts with its
NEXTN layer. Facts of the files that `source` names; what SGLang 0.5.21 says to them is shown by
tests/ascend/test_published.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FOLDER = "test/registered/ascend/performance"  # in both repositories

_ALL = (
    *("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "ascend"),
    *("--device", "npu", "--attention-backend", "ascend", "--dtype", "bfloat16", "--tp-size", "4"),
    *("--quantization", "modelslim", "--speculative-draft-model-quantization", "unquant"),
    *("--mem-fraction-static", "0.72", "--max-prefill-tokens", "180000", "--disable-cuda-graph"),
    *("--moe-a2a-backend", "deepep", "--deepep-mode", "normal", "--disable-shared-experts-fusion"),
    *("--moe-dense-tp", "1", "--enable-dp-lm-head", "--attn-cp-size", "4"),
)
_ZIGZAG = ("--enable-prefill-cp", "--cp-strategy", "zigzag")
_PARSERS = ("--reasoning-parser", "glm45", "--tool-call-parser", "glm47")
_IN_SEQUENCE = ("--enable-nsa-prefill-context-parallel", "--nsa-prefill-cp-mode", "in-seq-split")
_NEXTN = (
    *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
)
_ZBAL: Mapping[str, str] = {
    "SGLANG_PP_LAYER_PARTITION": "18,20,24,16",
    "SGLANG_ZBAL_LOCAL_MEM_SIZE": "61184",
    "ZBAL_HCCL_OP": "send,recv",
    "ZBAL_NPU_ALLOC_CONF": "use_vmm_for_static_memory:True",
    "DEEP_USE_ALLTOALL_MODE": "1",
}


@dataclass(frozen=True)
class Published:
    """One command line; `arguments` lacks the model, the addresses and the rank of the node."""

    source: str  # "repository: path below test/registered/ascend/performance", at `commit`
    commit: str
    stages: int
    nodes: int
    chunk: int  # tokens
    running: int  # requests at most
    more: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # of stages, their links and experts

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            *_ALL,
            *("--pp-size", str(self.stages), "--nnodes", str(self.nodes)),
            *("--chunked-prefill-size", str(self.chunk), "--max-running-requests", str(self.running)),
            *self.more,
        )

    @property
    def name(self) -> str:
        return self.source.rpartition("/test_npu_")[2].removesuffix(".py")

    @property
    def renamed(self) -> bool:
        """Whether its context parallelism has names that 0.5.21 has no more."""
        return _IN_SEQUENCE[0] in self.more

    @property
    def for_0_5_21(self) -> tuple[str, ...]:
        """With the names of today in the place of earlier ones."""
        if not self.renamed:
            return self.arguments
        return (*(each for each in self.arguments if each not in _IN_SEQUENCE), *_ZIGZAG)

    @property
    def drafts(self) -> bool:
        return _NEXTN[0] in self.more

    def scaled(self, stages: int) -> tuple[str, ...]:
        """The names of today, for a tiny twin on two cores: what NOT_HERE lists is left out or smaller."""
        changes = {
            **_SMALLER,
            "--pp-size": str(stages),
            "--chunked-prefill-size": str(self.chunk // TOKENS_FOR_ONE),
        }
        return tuple(
            argument
            for option, values in _options(self.for_0_5_21)
            if option not in _LEFT_OUT
            for argument in (option, *((changes[option],) if option in changes else values))
        )


def _glm_5_1(name: str, commit: str, layout: tuple[int, int, int, int], *more: str) -> Published:
    source = f"sgl-project/sglang: glm5_1/test_npu_glm5_1_w4a8_{name}.py"
    return Published(source, commit, *layout, more)


def _glm_5_2(name: str, commit: str, nodes: int, chunk: int) -> Published:
    source = f"Ascend/sglang: glm5_2/test_npu_{name}.py"
    return Published(source, commit, 4, nodes, chunk, 16, (*_IN_SEQUENCE, *_NEXTN), _ZBAL)


TOKENS_FOR_ONE = 32  # published tokens of a chunk for one here
CONTEXT_RANKS = 2  # of a stage here: all that it has
_SMALLER = {
    **dict.fromkeys(("--tp-size", "--attn-cp-size"), str(CONTEXT_RANKS)),
    "--dtype": "float32",
    "--mem-fraction-static": "0.3",
}
_LEFT_OUT = ("--nnodes", "--quantization", "--moe-a2a-backend", "--deepep-mode")


def _options(arguments: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Each option with its values."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            found.append((argument, []))
        else:
            found[-1][1].append(argument)
    return found


_F61 = "f61f460b3205509887063e965822021f189c96ab"
_BEA = "bea34a88b966f2611dc75bade73871c4e174a21d"
_NOW = (*_ZIGZAG, *_PARSERS)

PUBLISHED = (  # layouts: stages, nodes, tokens a chunk, requests at most
    _glm_5_1("1p1d_32p_in64k_out1k_20ms", _F61, (8, 2, 8192, 16), *_NOW),
    _glm_5_1(
        "1p1d_32p_in128k_out1k_20ms", "8b87e6960f7476a8af666342120880c23d7ec3e1", (8, 2, 8192, 16), *_NOW
    ),
    _glm_5_1("2p1d_48p_in128k_out1k_prefix90_50ms", _F61, (8, 2, 16384, 32), *_NOW),
    _glm_5_1("4p1d_48p_in64k_out1k_prefix90_50ms", _F61, (4, 1, 16384, 16), *_NOW),
    _glm_5_1(
        "1p1d_32p_in64k_out1k_50ms_aime26",
        "0184e9cc3d92f6d54252dabec3fbc396638a6046",
        (8, 2, 16384, 16),
        *_IN_SEQUENCE,
    ),
    _glm_5_2("glm_5_2_w4a8_3p1d_32p_in16k_out1k_50ms", "3f43c7e7634060627fd9e4510df4336a1d0c8d5c", 1, 4096),
    _glm_5_2("glm_5_2_w4a8_2p1d_32p_in64k_out1k_prefix90_20ms", _BEA, 2, 16384),
    _glm_5_2(
        "glm_5_2_w4a8_2p1d_32p_in128k_out1k_prefix90_20ms",
        "a80f1d74c3dd507e31d3b7f3ab5f6e306cec0627",
        2,
        16384,
    ),
    _glm_5_2("glm5_2_w4a8_4p1d_48p_in64k_out1k_prefix90_50ms", _BEA, 1, 16384),
    _glm_5_2("glm_5_2_w4a8_4p1d_48p_in128k_out1k_prefix90_50ms", _BEA, 1, 16384),
)


# By `make topologies`: seconds from the start of a line's servers to their end, at so many stages; lines that
# are equal once they are scaled shared servers. All answered as a plain forward of the model does.
SERVED_ON = "2026-11-30"
SERVED: Mapping[str, Mapping[int, int]] = {
    "glm5_1_w4a8_1p1d_32p_in64k_out1k_20ms": {2: 193, 4: 217},
    "glm5_1_w4a8_1p1d_32p_in128k_out1k_20ms": {2: 193, 4: 217},
    "glm5_1_w4a8_2p1d_48p_in128k_out1k_prefix90_50ms": {2: 127, 4: 1101},
    "glm5_1_w4a8_4p1d_48p_in64k_out1k_prefix90_50ms": {2: 126, 4: 318},
    "glm5_1_w4a8_1p1d_32p_in64k_out1k_50ms_aime26": {2: 173, 4: 646},
    "glm_5_2_w4a8_3p1d_32p_in16k_out1k_50ms": {2: 169, 4: 469},
    "glm_5_2_w4a8_2p1d_32p_in64k_out1k_prefix90_20ms": {2: 236, 4: 390},
    "glm_5_2_w4a8_2p1d_32p_in128k_out1k_prefix90_20ms": {2: 236, 4: 390},
    "glm5_2_w4a8_4p1d_48p_in64k_out1k_prefix90_50ms": {2: 236, 4: 390},
    "glm_5_2_w4a8_4p1d_48p_in128k_out1k_prefix90_50ms": {2: 236, 4: 390},
}
STAGES_HERE = (2, 4)


# Of the lines above: what neither the CPU nor the simulated Ascend can do, and what tests have in its place.
NOT_HERE = (
    (
        "the models, `--quantization modelslim`",
        "sizes; kernels for W4A8",
        "twins with 4 and 8 layers and random float32 weights (`rig/published_twin.py`)",
    ),
    (
        "kernels of sparse attention (DSA), of latent attention and of experts",
        "the hardware",
        "plain torch, checked against their formulas (`reference_dsa_kernels.py`)",
    ),
    (
        "context parallelism in 0.5.21",
        "its attention on NPUs calls `rebuild_cp_kv_cache`, which it lacks (sglang #40165)",
        "SGLang 0.5.23, which has it",
    ),
    (
        "`--moe-a2a-backend deepep`, `--deepep-mode normal`",
        "its kernels need the hardware",
        "the all-reduce of SGLang's default",
    ),
    (
        "memfabric_hybrid, under `--disaggregation-transfer-backend ascend`",
        "its engine needs the hardware",
        "an engine that copies memory between processes, under SGLang's own manager",
    ),
    (
        "kernels that draft and verify drafts",
        "the hardware, and Triton for it",
        "plain torch for chains (`reference_draft_kernels.py`): prefill and decode servers draft",
    ),
    (
        "`--attn-cp-size 4`, `--tp-size 4`, `--pp-size 8`, two nodes",
        "two cores",
        "2, 2, and 2 or 4 stages on one node",
    ),
    ("chunks of 4k to 16k tokens", "two cores", f"one token for {TOKENS_FOR_ONE}"),
    (
        "`SGLANG_PP_LAYER_PARTITION=18,20,24,16`",
        "8 layers",
        "2,6 and 1,1,4,2: as there, each stage begins with a layer that has an indexer",
    ),
    (
        "`SGLANG_ZBAL_*`, `ZBAL_*`",
        "its operations are programs for AI cores, which memfabric-zbal (1.2.0 is on PyPI) loads into CANN "
        "(`aclrtBinaryLoadFromData`)",
        "HCCL",
    ),
)


def markdown() -> list[str]:
    """Lines of docs/topologies.md."""
    variables = [f"`{name}={value}`" for name, value in PUBLISHED[-1].environment.items()]
    return [
        "## The published command lines",
        "",
        "Prefill servers, tp 4, context parallelism within a stage, experts over DeepEP, one line each. "
        f"Sources are below `{FOLDER}`. Some have earlier names of flags: `{' '.join(_IN_SEQUENCE)}`, in "
        f"0.5.21 `{' '.join(_ZIGZAG)}`. That its parser takes each line, and what this package does with "
        "such a server, is shown on the simulated Ascend by `tests/ascend/test_published.py`. Servers of "
        "tiny twins are shown by `tests/server/test_published_lines.py`; every line "
        "is served by `make topologies`, at two stages of two ranks and at four. Columns *served* have its "
        f"runs on {SERVED_ON}, on two cores: seconds from start to end of its servers, which answered as "
        "a plain forward of the model does. At four stages other tests ran beside most of them, with more "
        "right to the cores. Lines that are equal once they are scaled share servers.",
        "",
        "| source | commit | stages | nodes | tokens a chunk | draft | flags of 0.5.21 | here | "
        f"{' | '.join(f'served, {stages} stages' for stages in STAGES_HERE)} |",
        f"|{'---|' * (8 + len(STAGES_HERE))}",
        *(_row(line) for line in PUBLISHED),
        "",
        f"Those with a draft also set {', '.join(variables)}.",
        "",
        "What they ask for that cannot be had here, and what stands in for it in tests:",
        "",
        "| asked for | missing | in its place |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in NOT_HERE),
    ]


def _row(line: Published) -> str:
    cells = (
        line.source,
        line.commit[:9],
        str(line.stages),
        str(line.nodes),
        str(line.chunk),
        "NEXTN" if line.drafts else "none",
        "earlier names" if line.renamed else "yes",
        "in force",
        *(_seconds(line, stages) for stages in STAGES_HERE),
    )
    return f"| {' | '.join(cells)} |"


def _seconds(line: Published, stages: int) -> str:
    seconds = SERVED.get(line.name, {}).get(stages)
    return "not run" if seconds is None else f"{seconds} s"
