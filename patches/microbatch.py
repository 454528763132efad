"""Which requests a microbatch has, in words that two stages can compare.

Every stage decides for itself which requests it runs next. Upstream relies on all of them deciding alike;
when one did not (an abort, a time limit, a grammar that was ready on one stage only), it computed on the
rows of other requests, or hung. So proxies say which requests they belong to.
"""

from __future__ import annotations

import zlib
from typing import Any


def describe(batch: Any) -> str:
    """For example "decode of 3 requests, 3 tokens (5f3a9c01)"; the number checks the ids in order."""
    names = [request.rid for request in batch.reqs]
    mode = batch.forward_mode
    tokens = batch.extend_num_tokens if mode.is_extend() else len(names)
    digest = zlib.crc32("\n".join(names).encode())
    return f"{mode.name.lower()} of {len(names)} requests, {tokens} tokens ({digest:08x})"
