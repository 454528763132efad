"""`python -m sglang_npu_pp doctor`: readiness of this machine. One module a subject; `command.py` prints the
findings."""
