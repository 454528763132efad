"""What a stage streams to the detokenizer, which only stage 0 has.

A request and a pipeline are stand-ins here: of the one only `finished` is asked, of the other its stage. That
answers stay as they are is shown by the servers in tests/server.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_npu_pp.patches import PATCHES
from sglang_npu_pp.patches.outputs import stream_output
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patching import bind

RUNNING, FINISHED = (SimpleNamespace(finished=lambda done=done: done) for done in (False, True))


@pytest.fixture(autouse=True)
def no_pipeline_afterwards() -> Iterator[None]:
    yield
    set_current(None)


@pytest.mark.parametrize(
    ("stage", "given", "streamed"),
    [
        (0, [RUNNING, FINISHED], [[RUNNING, FINISHED]]),
        (0, [], [[]]),
        (1, [RUNNING, FINISHED], [[FINISHED]]),
        (1, [RUNNING], []),
        (3, [FINISHED], [[FINISHED]]),
        (None, [RUNNING], [[RUNNING]]),  # upstream's path
    ],
)
def test_later_stages_stream_what_has_finished(
    stage: int | None, given: list[Any], streamed: list[list[Any]]
) -> None:
    calls = []

    def original(streamer: str, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        calls.append(reqs)
        assert (streamer, return_logprob, skip_req) == ("streamer", True, "chunked")

    pipeline: Any = None if stage is None else SimpleNamespace(link=SimpleNamespace(stage=stage))
    set_current(pipeline)
    (patch,) = (patch for patch in PATCHES if patch.wrapper is stream_output)
    bind(patch, original)("streamer", given, True, skip_req="chunked")
    assert calls == streamed
