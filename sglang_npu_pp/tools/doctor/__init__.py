"""`python -m sglang_npu_pp doctor`: is this machine ready to serve, and what would the server say?

One module a subject; each gives findings, `command.py` puts them together.
"""
