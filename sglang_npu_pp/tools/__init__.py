"""Commands of `python -m sglang_npu_pp`, for people; nothing here runs in a server."""
