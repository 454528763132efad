"""Which tokens may end a request, against upstream's own check; and when a prepared decode is taken back.

Requests and their tokenizer are real. In the second part the scheduler, its batch and its allocator are
stand-ins, which show order only; that a preparation of upstream's is taken back exactly is shown by
tests/server/test_ahead.py, in servers.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rig.launcher import RANDOM_MODEL
from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.patches import ahead as ahead_module
from sglang_npu_pp.patches.ahead import Ahead, _ends_or_is_special, may_end
from sglang_npu_pp.streams import DeviceStreams

VOCABULARY = 512


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    return get_tokenizer(str(RANDOM_MODEL))


def make_request(tokenizer: Any, output: list[int], eos: set[int], **sampling: Any) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(**sampling)
    params.normalize(tokenizer)
    request = Req("r", "", array("q", [1, 2, 3]), params, eos_token_ids=eos, vocab_size=VOCABULARY)
    request.tokenizer = tokenizer
    request.output_ids.extend(output)
    return request


tokens = st.integers(0, VOCABULARY - 1)
stops = st.sampled_from(["a", "e", " ", "th", "qzx"])


@given(
    output=st.lists(tokens, max_size=6),
    token=st.one_of(tokens, st.sampled_from([0, 1, 2, -1, VOCABULARY, VOCABULARY + 7])),
    eos=st.sets(st.integers(0, 5), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3),
    stop=st.lists(stops, max_size=2),
    stop_regex=st.sampled_from([None, "[0-9]", "a|b$"]),
    ignore_eos=st.booleans(),
    max_new_tokens=st.integers(1, 9),
)
def test_what_goes_on_here_goes_on_upstream(
    tokenizer: Any, output: list[int], token: int, eos: set[int], **sampling: Any
) -> None:
    request = make_request(tokenizer, output, eos, **sampling)
    surely_goes_on = not _ends_or_is_special(request) and not may_end(request, token)
    before = list(request.output_ids), request.finished_reason
    assert before == (output, None), "asking has changed the request"
    request.output_ids.append(token)
    request.update_finish_state(1)
    if surely_goes_on:
        assert not request.finished()
    # And nothing is taken back in vain, but for a length that is not asked about with a token.
    elif not _ends_or_is_special(make_request(tokenizer, output, eos, **sampling)):
        assert request.finished()


def test_each_reason_to_end_is_seen(tokenizer: Any) -> None:
    """So that the property above cannot hold because nothing ever ends."""
    plain = {"max_new_tokens": 9}
    ends = tokenizer.eos_token_id
    assert not may_end(make_request(tokenizer, [20], set(), **plain), 30)
    assert may_end(make_request(tokenizer, [20], set(), **plain), ends)
    assert not may_end(make_request(tokenizer, [20], {30}, **plain, ignore_eos=True), 30)
    assert may_end(make_request(tokenizer, [20], {30}, **plain), 30)
    assert may_end(make_request(tokenizer, [20], set(), **plain, stop_token_ids=[30]), 30)
    assert may_end(make_request(tokenizer, [20], set(), **plain, ignore_eos=True), VOCABULARY)
    text = tokenizer.decode([30])
    assert may_end(make_request(tokenizer, [20], set(), **plain, stop=[text]), 30)
    assert not may_end(make_request(tokenizer, [20], set(), **plain, stop=["\x00"]), 30)
    assert _ends_or_is_special(make_request(tokenizer, [20] * 8, set(), **plain))
    assert not _ends_or_is_special(make_request(tokenizer, [20] * 7, set(), **plain))


# --- order, with a stand-in of the scheduler -------------------------------------------------------------


class Scheduler:
    """Counts the decodes of one batch, as the length of its only request."""

    def __init__(self, done: list[str]) -> None:
        self.done = done
        sampling = SimpleNamespace(
            max_new_tokens=9, stop_strs=[], stop_regex_strs=[], ignore_eos=False, stop_token_ids={7}
        )
        self.request: Any = SimpleNamespace(
            rid="r",
            to_finish=None,
            grammar=None,
            output_ids=[],
            sampling_params=sampling,
            vocab_size=VOCABULARY,
            eos_token_ids=None,
            tokenizer=None,
            decode_batch_idx=0,
            kv=SimpleNamespace(kv_committed_len=4, kv_allocated_len=4),
            finished=lambda: False,
        )
        self.token_to_kv_pool_allocator = SimpleNamespace(page_size=1, free=8, available_size=lambda: 8)
        self.new_token_ratio_tracker = SimpleNamespace(current=0.5)
        self.batch = SimpleNamespace(
            reqs=[self.request],
            forward_mode=SimpleNamespace(is_decode=lambda: True),
            is_prefill_only=False,
            has_grammar=False,
            sampling_info=SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False)),
            batch_is_full=False,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            input_ids=[1],
            length=4,
        )
        self.forward_stream_ctx = nullcontext()
        self.mbs = self.running_mbs = [self.batch]
        self.disaggregation_mode = SimpleNamespace(value="null")
        self.chunked_req: Any = None
        self.waiting_queue: list[Any] = []
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)

    def update_running_batch(self, batch: Any) -> Any:
        self.done.append("prepared")
        batch.length += 1
        self.request.kv.kv_committed_len += 1
        self.request.kv.kv_allocated_len += 1
        self.request.decode_batch_idx += 1
        self.token_to_kv_pool_allocator.free -= 1
        return batch

    @property
    def state(self) -> tuple[int, ...]:
        return (
            self.batch.length,
            self.request.kv.kv_committed_len,
            self.request.kv.kv_allocated_len,
            self.request.decode_batch_idx,
            self.token_to_kv_pool_allocator.free,
        )


BEFORE, PREPARED = (4, 4, 4, 0, 8), (5, 5, 5, 1, 7)
GOES_ON, ENDS = [3], [7]


@pytest.fixture
def done() -> list[str]:
    return []


@pytest.fixture
def scheduler(done: list[str]) -> Scheduler:
    return Scheduler(done)


@pytest.fixture
def make_ahead(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Ahead]:
    monkeypatch.setattr(ahead_module, "planned_without_ids", lambda scheduler, batch: f"of {batch.length}")
    link: Any = SimpleNamespace(
        trace=SimpleNamespace(record=lambda *event: None),
        telemetry=SimpleNamespace(prepared=0, taken_back=0),
        context=SimpleNamespace(where="stage 0 rank 0"),
    )
    return lambda launch_first: Ahead(scheduler, link, DeviceStreams("cpu"), launch_first)


def process_of(scheduler: Scheduler) -> Callable[[Any, Any], None]:
    def process(batch: Any, result: str) -> None:
        scheduler.done.append(f"processed {result} of length {batch.length}, {batch.input_ids}")

    return process


def run(scheduler: Scheduler, ahead: Ahead, tokens: list[int]) -> None:
    """As upstream's loop, to the end of an iteration."""
    ahead.prepare(scheduler.batch, 0)
    ahead.check(tokens)
    scheduler.batch.input_ids = None
    ahead.process(process_of(scheduler), scheduler.batch, "tokens")


PROCESSED = "processed tokens of length 4, None"


@pytest.mark.parametrize("launch_first", [True, False])
def test_tokens_are_processed_as_if_nothing_were_prepared(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead], launch_first: bool
) -> None:
    ahead = make_ahead(launch_first)
    run(scheduler, ahead, GOES_ON)
    assert scheduler.state == PREPARED
    assert ahead.take(scheduler.batch)
    ahead.expect_taken()
    assert ahead.take_forward(scheduler.batch) == "of 5"
    assert ahead.take_forward(scheduler.batch) is None, "it was launched twice"
    scheduler.done.append("launched")
    ahead.behind_launch()
    first, second = ("launched", PROCESSED) if launch_first else (PROCESSED, "launched")
    assert scheduler.done == ["prepared", first, second]
    assert not ahead.take(scheduler.batch)  # once


def test_a_request_that_ends_takes_it_back(scheduler: Scheduler, make_ahead: Callable[[bool], Ahead]) -> None:
    ahead = make_ahead(True)
    run(scheduler, ahead, ENDS)
    assert scheduler.state == BEFORE
    assert scheduler.done == ["prepared", PROCESSED]
    assert not ahead.take(scheduler.batch)
    assert ahead.take_forward(scheduler.batch) is None


def test_what_arrives_finds_everything_processed_and_nothing_prepared(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead]
) -> None:
    ahead = make_ahead(True)
    run(scheduler, ahead, GOES_ON)
    ahead.settle()
    assert scheduler.state == BEFORE
    assert scheduler.batch.input_ids is None, "the ids of the last launch are back"
    assert scheduler.done == ["prepared", PROCESSED]
    ahead.behind_launch()
    assert scheduler.done == ["prepared", PROCESSED]


def test_a_request_that_waits_is_scheduled_as_upstream_would(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead]
) -> None:
    ahead = make_ahead(True)
    run(scheduler, ahead, GOES_ON)
    ahead.settle_if_more_may_run()
    assert scheduler.state == PREPARED
    scheduler.waiting_queue.append("a request")
    scheduler.batch.batch_is_full = True  # and cannot run
    ahead.settle_if_more_may_run()
    assert scheduler.state == PREPARED
    scheduler.batch.batch_is_full = False
    ahead.settle_if_more_may_run()
    assert scheduler.state == BEFORE


def no_room(scheduler: Scheduler) -> None:
    scheduler.token_to_kv_pool_allocator.available_size = lambda: 0


def last_token(scheduler: Scheduler) -> None:
    scheduler.request.output_ids = [3] * 8


def is_aborted(scheduler: Scheduler) -> None:
    scheduler.request.to_finish = "abort"


def waits(scheduler: Scheduler) -> None:
    scheduler.waiting_queue.append("a request")


def has_chunks(scheduler: Scheduler) -> None:
    scheduler.chunked_req = "a request"


def compiles(scheduler: Scheduler) -> None:
    scheduler.grammar_manager.has_waiting_grammars = lambda: True


def has_penalties(scheduler: Scheduler) -> None:
    scheduler.batch.sampling_info.penalizer_orchestrator.is_required = True


def has_grammar(scheduler: Scheduler) -> None:
    scheduler.batch.has_grammar = True


def prefills(scheduler: Scheduler) -> None:
    scheduler.batch.forward_mode.is_decode = lambda: False


def runs_beside(scheduler: Scheduler) -> None:
    scheduler.running_mbs = [SimpleNamespace()]


def changed_role(scheduler: Scheduler) -> None:
    scheduler.disaggregation_mode.value = "prefill"


@pytest.mark.parametrize(
    "change",
    [
        no_room,
        last_token,
        is_aborted,
        waits,
        has_chunks,
        compiles,
        has_penalties,
        has_grammar,
        prefills,
        runs_beside,
        changed_role,
    ],
    ids=lambda change: change.__name__,
)
def test_nothing_is_prepared_where_a_decision_could_fall_otherwise(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead], change: Callable[[Scheduler], None]
) -> None:
    change(scheduler)
    ahead = make_ahead(True)
    run(scheduler, ahead, GOES_ON)
    assert scheduler.done == [PROCESSED]
    assert scheduler.state == BEFORE


def test_an_end_that_was_not_foreseen_is_named(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead]
) -> None:
    ahead = make_ahead(True)
    run(scheduler, ahead, GOES_ON)
    assert ahead.take(scheduler.batch)
    scheduler.request.finished = lambda: True
    with pytest.raises(PipelineError, match="stage 0 rank 0: .* the end of r, .*SGLANG_NPU_PP_AHEAD=0"):
        ahead.behind_launch()


def test_a_preparation_that_is_not_scheduled_is_named(
    scheduler: Scheduler, make_ahead: Callable[[bool], Ahead]
) -> None:
    ahead = make_ahead(True)
    run(scheduler, ahead, GOES_ON)
    with pytest.raises(PipelineError, match="not scheduled"):
        ahead.expect_taken()
