"""`python -m sglang_npu_pp topologies`: what servers combine with stages, and what has run of it.

One table; docs/topologies.md is the output of `--markdown`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..text import table
from . import published

_HEADER = ("feature", "SGLang with PP", "published for Ascend", "here", "shown on", "by")
NOT_RUN = "not run"
_COMMAND = "python -m sglang_npu_pp topologies --markdown > docs/topologies.md"
_EXPLANATION = (
    "For SGLang 0.5.21; nothing ran on Ascend hardware. Columns:",
    "",
    "- *SGLang with PP*: whether it starts such a server.",
    "- *Published*: where its repository has the feature for Ascend, with PP where there is such a place.",
    "- *Here*: whether the patches are in force on such a server.",
    "- *Shown on*, *by*: devices and tests. The patches are in force in a row that was not run, too.",
)

# In SGLang's repository.
ARGUMENTS = "`docs/platforms/ascend/ascend_npu_support_features.md`"
GLM_5_1 = f"`{published.FOLDER}/glm5_1`"
GLM_5_2 = f"`{published.FOLDER}/glm5_2`"
ONE_SERVER = "`runtime_options/test_npu_pp_single_node.py`"
PAIR = "`runtime_options/test_npu_disaggregation_pp.py`"

CPU = "CPU"
SIMULATED = "simulated Ascend"


class Here(Enum):
    """What this package does with a server that uses the feature."""

    IN_FORCE = "in force"
    UPSTREAM = "upstream's path"
    REFUSED = "refused by SGLang"


@dataclass(frozen=True)
class Shown:
    """A test with real servers, or on the simulated Ascend with SGLang's own classes."""

    device: str
    test: str  # "path::function", in this repository


@dataclass(frozen=True)
class Row:
    """A feature that servers combine with pipeline stages."""

    feature: str
    upstream: str  # whether SGLang 0.5.21 allows it with PP
    published: str  # for Ascend with PP, or else without; empty: not found
    here: Here
    shown: tuple[Shown, ...] = ()  # empty: not run
    note: str = ""  # what is missing, and why


_DIFFERENTIAL = Shown(CPU, "tests/server/test_differential.py::test_nothing_is_wrong")
_ON_NPU = Shown(SIMULATED, "tests/server/test_ascend.py::test_greedy_tokens_equal_the_cpu_servers")
_CHUNKS_ON_NPU = Shown(SIMULATED, "tests/server/test_ascend.py::test_long_prompts_are_prefilled_in_chunks")
_DP_ATTENTION = Shown(CPU, "tests/server/test_dp_attention.py::test_answers_are_upstreams")
_MIXED = Shown(CPU, "tests/server/regression/test_memory.py::test_prompts_are_prefilled_while_others_decode")
_REPLICAS = Shown(CPU, "tests/server/test_replicas.py::test_every_replica_has_files_of_its_own")
_PAIR = Shown(CPU, "tests/server/test_kv_transfer.py::test_answers_are_those_of_a_server_that_does_both")
_SPLITS = Shown(CPU, "tests/server/test_upstream_cases.py::test_prefill_and_decode_apart_say_the_same")
_ENGINE = Shown(
    SIMULATED, "tests/ascend/test_ascend_engine.py::test_chunks_leave_one_by_one_behind_their_forwards"
)
_LAYOUTS = Shown(CPU, "tests/server/test_layouts.py::test_answers_are_upstreams")
_CHUNKS = Shown(CPU, "tests/server/test_layouts.py::test_all_ranks_run_the_chunks_that_upstream_predicts")
_SPECULATION = Shown(CPU, "tests/server/test_speculation.py::test_answers_and_accepted_drafts_are_upstreams")
_SPECULATION_LOAD = Shown(
    CPU,
    "tests/server/test_speculation_load.py::"
    "test_every_answer_under_load_is_the_one_that_the_request_gets_alone",
)
_SPECULATION_FAULTS = Shown(
    CPU, "tests/server/test_speculation_faults.py::test_a_silent_fault_turns_a_comparison_red"
)
_PROPOSAL = Shown(CPU, "tests/server/test_prefill_drafts.py::test_greedy_answers_are_those_without_drafts")
_DSPARK = Shown(
    SIMULATED,
    "tests/server/test_prefill_dspark.py::test_tokens_and_what_the_draft_keeps_are_upstreams",
)
_SLICE_FAULT = Shown(CPU, "tests/server/test_layouts.py::test_a_slice_of_another_microbatch_changes_answers")
_SLICES = Shown(CPU, "tests/server/test_layouts.py::test_each_context_parallel_rank_sends_its_own_slice")
_STAGING = Shown(
    SIMULATED, "tests/server/test_staging_buffer.py::test_answers_and_what_was_cached_are_upstreams"
)
_PUBLISHED = Shown(
    SIMULATED, "tests/server/test_published_lines.py::test_answers_are_those_of_a_plain_forward"
)
_SPARSE = Shown(SIMULATED, "tests/server/test_sparse_attention.py::test_answers_are_those_of_a_plain_forward")

ROWS = (
    Row(
        "tensor parallelism, 2 to 4 stages",
        "yes",
        f"tp 4 pp 4 and pp 8: {GLM_5_1}; one server: {ONE_SERVER}",
        Here.IN_FORCE,
        (_DIFFERENTIAL, _ON_NPU),
        "8 stages: not run",
    ),
    Row(
        "two nodes (`--nnodes`)",
        "yes",
        GLM_5_1,
        Here.IN_FORCE,
        (_DIFFERENTIAL,),
        "two launchers on one machine; two network namespaces in `make lost-peers`",
    ),
    Row(
        "batches in reserve (`--pp-async-batch-depth`)",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (_DIFFERENTIAL,),
    ),
    Row(
        "graphs in decode",
        "yes",
        f"off in {GLM_5_1}",
        Here.IN_FORCE,
        (_ON_NPU,),
    ),
    Row(
        "chunks of several pages (page size 128, chunks of 256)",
        "yes",
        f"chunks of 8k and 16k: {GLM_5_1}",
        Here.IN_FORCE,
        (_CHUNKS_ON_NPU,),
        "pages have one token on CPU, since SGLang's allocator of larger ones needs Triton",
    ),
    Row(
        "dynamic chunk sizes (`--enable-dynamic-chunking`)",
        "yes: stage 0 measures, all ranks fit the same samples",
        ARGUMENTS,
        Here.IN_FORCE,
        (_LAYOUTS, _CHUNKS),
        "samples of a given parabola in the place of measured ones",
    ),
    Row(
        "uneven stages (`SGLANG_PP_LAYER_PARTITION`)",
        "yes",
        f"18,20,24,16: {GLM_5_2}",
        Here.IN_FORCE,
        (_LAYOUTS, _PUBLISHED),
    ),
    Row(
        "prefill mixed with decoding (`--enable-mixed-chunk`)",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (_MIXED,),
    ),
    Row(
        "data-parallel replicas (`--dp-size` alone)",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (_REPLICAS,),
    ),
    Row(
        "data-parallel attention, with idle ranks (`--enable-dp-attention`)",
        "yes",
        "NPU CI, tp 4 pp 4 dp 2",
        Here.IN_FORCE,
        (_DP_ATTENTION,),
        "on the simulated Ascend by hand: [waits.md](waits.md)",
    ),
    Row(
        "vocabulary of each attention group (`--enable-dp-lm-head`)",
        "yes",
        GLM_5_1,
        Here.IN_FORCE,
        (_DP_ATTENTION,),
        "0.5.21 turns it off without data-parallel attention, so in what is published",
    ),
    Row(
        "expert parallelism (`--ep-size 2`), all-reduce",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (_LAYOUTS,),
        "with context parallelism; with data-parallel attention SGLang asks for NCCL on CPU",
    ),
    Row(
        "expert parallelism over DeepEP (`--moe-a2a-backend deepep`)",
        "yes",
        f"normal mode: {GLM_5_1}",
        Here.IN_FORCE,
        note="its kernels need the hardware",
    ),
    Row(
        "ZBAL communication (`SGLANG_ZBAL_*`)",
        "yes",
        GLM_5_2,
        Here.IN_FORCE,
        note="its engine does not start without the hardware",
    ),
    Row(
        "LoRA (`--enable-lora`)",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (_LAYOUTS,),
        "torch's backend; overlapped loading and drainer: `tests/patches/test_decisions.py`",
    ),
    Row(
        "context parallelism, prefill, cp 2 (`--attn-cp-size`, `--enable-prefill-cp`), Qwen3-MoE",
        "yes; on NPU `layers/utils/cp_utils.py` refuses the first prefill",
        f"attn-cp 4: {GLM_5_1}; equal to tp: {ARGUMENTS}",
        Here.IN_FORCE,
        (_LAYOUTS, _SLICES, _SLICE_FAULT),
        "attention over the gathered sequence in the place of a kernel; cp 2 equal to tp",
    ),
    Row(
        "sparse attention (DSA), indexers shared across stages",
        "yes",
        f"{GLM_5_1}, {GLM_5_2}",
        Here.IN_FORCE,
        (_SPARSE,),
        "kernels in plain torch; answers are those of transformers' GLM-5",
    ),
    Row(
        "context parallelism with sparse attention (DSA)",
        "0.5.23; on NPUs 0.5.21 calls `rebuild_cp_kv_cache`, which it lacks",
        f"attn-cp 4: {GLM_5_1}",
        Here.IN_FORCE,
        (_PUBLISHED,),
        "SGLang 0.5.23, tp 2 and cp 2; kernels in plain torch",
    ),
    Row(
        "disaggregated prefill and decode, Mooncake",
        "yes",
        PAIR,
        Here.IN_FORCE,
        (_PAIR, _SPLITS),
        "both at tp 2 pp 2 in the second; a prefill server of 0.5.22 in `tests/server/test_releases.py`",
    ),
    Row(
        "the same, ascend transfer",
        "yes",
        GLM_5_1,
        Here.IN_FORCE,
        (_ENGINE, _PUBLISHED),
        "SGLang's manager and sender; a stand-in copies the memory",
    ),
    Row(
        "pictures (Qwen3-VL)",
        "yes",
        "",
        Here.IN_FORCE,
        (_DIFFERENTIAL, _ON_NPU),
    ),
    Row(
        "W4A8 weights (`--quantization modelslim`)",
        "yes",
        GLM_5_1,
        Here.IN_FORCE,
        note="its kernels need the hardware",
    ),
    Row(
        "speculative decoding on prefill servers (EAGLE, NEXTN)",
        "yes",
        f"NEXTN: {GLM_5_2}",
        Here.IN_FORCE,
        (_PROPOSAL, _PUBLISHED),
        "latent attention, experts; on the simulated Ascend sparse attention, SGLang 0.5.23; a decode server "
        "with one stage, which verifies; kernels in plain torch",
    ),
    Row(
        "speculative decoding on prefill servers (DSPARK)",
        "from 0.5.22 on, not on CPU",
        "",
        Here.IN_FORCE,
        (_DSPARK,),
        "SGLang 0.5.22 and 0.5.23, a Qwen3, no decode server behind it: tokens, and what the draft keeps "
        "of each prompt",
    ),
    Row(
        "speculative decoding on one server (`SGLANG_ENABLE_PP_SPEC=1`, EAGLE, NEXTN)",
        "yes; without data-parallel attention",
        "",
        Here.IN_FORCE,
        (_SPECULATION, _SPECULATION_LOAD, _SPECULATION_FAULTS),
        "pp 2 and 4, trees and chains; grammars, aborts, retracted requests; kernels in plain torch",
    ),
    Row(
        "other speculation (EAGLE3, NGRAM, STANDALONE, DFLASH)",
        "no",
        f"without PP: {ARGUMENTS}",
        Here.REFUSED,
    ),
    Row(
        "hierarchical cache (`--enable-hierarchical-cache`), storage in files",
        "yes",
        ARGUMENTS,
        Here.IN_FORCE,
        (
            Shown(
                CPU, "tests/server/test_hierarchical_cache.py::test_answers_and_what_was_cached_are_upstreams"
            ),
        ),
        "its copies in plain torch; the same on the simulated Ascend (`make test-release`); other storage "
        "(Mooncake, memcache): not run",
    ),
    Row(
        "the same, host memory as a staging buffer (`--hicache-host-memory-mode buffer_only`)",
        "yes; up to 0.5.22 stages agree on what was read with Mooncake's storage only",
        "",
        Here.IN_FORCE,
        (_STAGING,),
        "Mooncake's store over TCP; storage in files: not run",
    ),
    Row(
        "data parallelism of experts, elastic experts, DWDP (`--moe-dp-size`, `--elastic-ep-backend`, "
        "`--dwdp-size`)",
        "no",
        "",
        Here.REFUSED,
    ),
    Row(
        "layers of a DSA cache split over cp ranks (`--enable-dsa-cache-layer-split`)",
        "no",
        "",
        Here.REFUSED,
    ),
)


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "topologies",
        help="what servers combine with pipeline stages, and what has run of it",
        description="Prints which features of SGLang work with pipeline stages and this package, and which "
        "test shows it on which device. SGLang is not imported.",
    )
    parser.add_argument("--markdown", action="store_true", help="as docs/topologies.md has it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(markdown() if options.markdown else text())
    return 0


def text() -> str:
    """For the terminal: three columns."""
    rows = [(row.feature, row.here.value, _devices(row)) for row in ROWS]
    return table([("here", "shown on", "feature"), *((here, devices, name) for name, here, devices in rows)])


def markdown() -> str:
    """docs/topologies.md."""
    lines = [
        "# Topologies: features combined with pipeline stages",
        "",
        f"<!-- Written by `{_COMMAND}`; do not edit. -->",
        "",
        *_EXPLANATION,
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|{'---|' * len(_HEADER)}",
    ]
    for row in ROWS:
        tests = [f"`{shown.test}`" for shown in row.shown]
        by = "; ".join([*tests, *([row.note] if row.note else [])])
        cells = (row.feature, row.upstream, row.published or "not found", row.here.value, _devices(row), by)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *published.markdown()])


def _devices(row: Row) -> str:
    if row.here is not Here.IN_FORCE:
        return ""
    return ", ".join(dict.fromkeys(shown.device for shown in row.shown)) or NOT_RUN
