"""SGLang's own tests of pipeline parallelism, and the tests here that check the same.

A case is one test of SGLang, named as there; a test that stands for it carries the mark `upstream_case`, so
`pytest -k TestFixedBugs` runs it, and test_upstream_cases.py sees that none is without a test. SGLang's own
ask a trained model for its score, so tests here ask for more: the very tokens of a server with one stage or
without this package. They run on the CPU, or the simulated Ascend where SGLang's ran on an NPU.

Facts of test/registered/distributed/test_pp_single_node.py and test_disaggregation_pp.py in
sgl-project/sglang (717e537, 4ecbcf0), and of test_npu_pp_single_node.py and test_npu_disaggregation_pp.py
below test/registered/ascend/basic_function/parameter/runtime_options, which repeat their classes on an NPU
(read in EdwardXuy/sglang, 5e65f39 and 1a709cf).
"""

from __future__ import annotations

import pytest

from .named_cases import mark_of

CASES = {
    "TestPPAccuracy.test_gsm8k": "tp 2 pp 2, chunks of 256: the score of 200 questions, 128 at a time",
    "TestPPAccuracy.test_logprob": "the same server: a log-probability for each token, of prompt and answer",
    "TestDPAttentionDP2PP2.test_mgsm_en": "latent attention, tp 2 pp 2, data-parallel attention dp 2",
    "TestQwenVLPPAccuracy.test_gsm8k": "Qwen-VL at pp 4, text",
    "TestQwenVLPPAccuracy.test_mmmu": "Qwen-VL at pp 4, pictures",
    "TestQwenPPAccuracy.test_pp_consistency": "Qwen3: pp 2 scores as pp 1",
    "TestQwenPPTieWeightsAccuracy.test_pp_consistency": "the same, the head being the embedding",
    "TestQwenMoePPAccuracy.test_pp_consistency": "the same with experts",
    "TestFixedBugs.test_chunked_prefill_with_small_bs": "tp 2 pp 2, chunks of 256, two requests at most: one "
    "token in, one out",
    "TestGLM41VPPAccuracy.test_mmmu": "GLM-4.1V at pp 2, pictures",
    "TestDisaggregationPrefillPPAccuracy.test_gsm8k": "prefill tp 2 pp 2, decode tp 2",
    "TestDisaggregationPrefillPPDynamicChunkAccuracy.test_gsm8k": "the same with dynamic chunk sizes",
    "TestDisaggregationDecodePPAccuracy.test_gsm8k": "prefill and decode tp 2 pp 2; on an NPU with "
    "batches in reserve and microbatches of two requests in prefill",
    "Ascend/sglang-149": "the two files for an NPU do not start at tp 2 pp 4",
}

ELSEWHERE = {
    "TestQwen35PPAccuracy.test_pp_consistency": "Qwen3.5 at pp 2 (SGLang's CI leaves it out): its linear "
    "attention has kernels for accelerators only, and in SGLang's own CPU kernels, which have no wheel",
}


def upstream_case(*names: str) -> pytest.MarkDecorator:
    """Mark a test as one that stands for these cases."""
    return mark_of("upstream_case", CASES, "SGLang's tests", names)
