"""What SGLang 0.5.13, which has no `get_parallel()`, is asked for instead."""

from __future__ import annotations

import sys

import pytest
from sglang.srt import runtime_context
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention

from sglang_npu_pp.patches import parallel


@pytest.fixture
def without_context(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt

    monkeypatch.delattr(sglang.srt, "runtime_context")
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", None)


def test_later_releases_say_it_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: "theirs")
    monkeypatch.setattr(runtime_context, "get_memory", lambda: "memory")
    assert parallel.get_parallel() == "theirs"
    assert parallel.memory_settings() == ["memory"]


@pytest.mark.usefixtures("without_context")
def test_each_is_asked_where_that_release_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in parallel._IN_PARALLEL_STATE.items():
        monkeypatch.setattr(parallel_state, function, lambda name=name: f"the {name}", raising=False)
    monkeypatch.setattr(dp_attention, "get_attention_dp_size", lambda: 3, raising=False)
    found = parallel.get_parallel()
    assert {name: getattr(found, name) for name in parallel._IN_PARALLEL_STATE} == {
        name: f"the {name}" for name in parallel._IN_PARALLEL_STATE
    }
    assert found.attn_dp_size == 3
    assert getattr(found, "attn_dp_enabled", None) is None
    assert parallel.memory_settings() == []
