"""What SGLang 0.5.21 takes for granted where a server drafts with a NEXTN layer, on CPU.

Embedding and head of the target are handed to the draft with a wait for CUDA, which is not there. And each
stage of a prefill server has a draft, of which the last one's is right; which of them a decode server gets is
decided as on an NPU: that one.
"""

from __future__ import annotations


def register() -> None:
    import torch
    from sglang.srt.disaggregation import prefill

    torch.cuda.synchronize = lambda device=None: None
    prefill._is_npu = True  # read where the buffers of the draft are added to the stage's, and nowhere else
