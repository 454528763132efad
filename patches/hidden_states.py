"""`return_hidden_states`: what the last stage computed comes to stage 0, which answers the client.

Upstream leaves hidden states out of what the last stage tells the others, and then ends in all of them
(AttributeError: 'NoneType' object has no attribute 'hidden_states'). Here they travel with the tokens, to
stage 0 only; the other stages get an answer without them, which upstream's processing leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_npu_pp.token_return import FOR_FIRST_STAGE

_HIDDEN_STATES = f"{FOR_FIRST_STAGE}hidden_states"
_INPUT_LENGTHS = f"{FOR_FIRST_STAGE}extend_input_len_per_req"


def add_hidden_states(scheduler: Any, batch: Any, result: Any, outputs: dict[str, Any]) -> None:
    """Add the hidden states of a forward, if its requests want them, to what the last stage returns.

    A replayed graph would overwrite them, so they are copied on the forward stream.
    """
    logits = result.logits_output
    if not batch.return_hidden_states or logits is None or logits.hidden_states is None:
        return
    with scheduler.forward_stream_ctx:
        outputs[_HIDDEN_STATES] = logits.hidden_states.clone()
        outputs[_INPUT_LENGTHS] = result.extend_input_len_per_req


def give_hidden_states(batch: Any, result: Any, values: Mapping[str, Any]) -> None:
    """Put them where upstream's processing looks for them. It looks whenever a request wants them."""
    if not batch.return_hidden_states:
        return
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    if result.logits_output is None:
        result.logits_output = LogitsProcessorOutput(next_token_logits=None)
    result.logits_output.hidden_states = values.get(_HIDDEN_STATES)
    if result.extend_input_len_per_req is None:
        result.extend_input_len_per_req = values.get(_INPUT_LENGTHS)
