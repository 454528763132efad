"""Failures of pipeline parallelism that users of SGLang and its neighbours have met, and the tests of each.

The list is section 4 of the field notes, a row a case; cases with one cause share a row and a name. A test
that shows one carries the mark `field_case`, so `pytest -k sglang-15545` runs a case, and
test_field_cases.py sees that none is without a test. Every case is shown twice: the bad behaviour planted,
which the test notices, and the same work done by this package.
"""

from __future__ import annotations

import pytest

from .named_cases import mark_of

CASES = {
    "sglang-23472": "all ranks of a ring send first: rendezvous sends wait for each other "
    "(also #23477, #30844, #35559, #38249)",
    "sglang-15545": "wrong output with more microbatches in flight: proxies were not tied to the forward "
    "that reads them (also #15527)",
    "sglang-15843": "garbled text at tp 4 pp 2",
    "sglang-22747": "batched P2P wants tensors with a storage offset of zero",
    "sglang-25887": "aborts and time limits were decided by each stage: size mismatch after hours, ranks "
    "waiting in different places (also #28881, #29405, #34572)",
    "sglang-28424": "a grammar was ready on one stage before another, so they ran different batches "
    "(also #30747)",
    "sglang-36248": "a prefill graph reads its proxies where they were when it was captured",
    "sglang-39423": "pinned copies from the host hung now and then on Ascend with data-parallel attention",
    "vllm-54962": "a send buffer was rewritten by the next forward; what was computed from it stayed in the "
    "prefix cache",
    "vllm-56956": "a warm-up broadcast and activations between stages waited for each other",
    "vllm-40749": "the last stage tried to receive the tokens that it had sampled itself",
    "vllm-ascend-4973": "stages other than the last had no outputs",
    "tensorrt-llm-10488": "a buffer was written or freed while an asynchronous send read it (also #3688)",
    "megatron-4047": "a tensor was freed before its send had been waited for: NaN",
    "megatron-5240": "communicators of pairs were made on first use, in another order on each rank",
    "megatron-5100": "shapes were exchanged in one order on both ranks: crossed, or a deadlock",
    "gpustack-3452": "pp 2 does not start on Ascend (also Ascend/sglang #139)",
}

ELSEWHERE = {
    "sglang-19239": "which heads of the KV cache a prefill server with stages sends to a decode server of "
    "another tensor-parallel size: the transfer of the KV cache is not part of this package yet",
}


def field_case(*names: str) -> pytest.MarkDecorator:
    """Mark a test as one that shows these cases."""
    return mark_of("field_case", CASES, "field cases", names)
