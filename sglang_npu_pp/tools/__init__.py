"""Commands of `python -m sglang_npu_pp`."""
