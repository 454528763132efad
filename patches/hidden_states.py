"""`return_hidden_states`: hidden states of the last stage for stage 0, which answers the client.

Not sent upstream, where other stages end (AttributeError: 'NoneType' object has no attribute
'hidden_states'). Here they travel with the tokens, to stage 0 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_npu_pp.token_return import FOR_FIRST_STAGE

from .pipeline import forward_stream

_HIDDEN_STATES = f"{FOR_FIRST_STAGE}hidden_states"
_INPUT_LENGTHS = f"{FOR_FIRST_STAGE}extend_input_len_per_req"


def add_hidden_states(scheduler: Any, batch: Any, result: Any, outputs: dict[str, Any]) -> None:
    """Add requested hidden states to the outputs of the last stage.

    Copied on the forward stream, since a graph's replay overwrites them.
    """
    logits = result.logits_output
    if not batch.return_hidden_states or logits is None or logits.hidden_states is None:
        return
    with forward_stream(scheduler):
        outputs[_HIDDEN_STATES] = logits.hidden_states.clone()
        outputs[_INPUT_LENGTHS] = result.extend_input_len_per_req


def give_hidden_states(batch: Any, result: Any, values: Mapping[str, Any]) -> None:
    """For upstream's processing, which reads them for every request that asked."""
    if not batch.return_hidden_states:
        return
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    if result.logits_output is None:
        result.logits_output = LogitsProcessorOutput(next_token_logits=None)
    result.logits_output.hidden_states = values.get(_HIDDEN_STATES)
    if result.extend_input_len_per_req is None:
        result.extend_input_len_per_req = values.get(_INPUT_LENGTHS)
