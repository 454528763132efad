"""`python -m sglang_npu_pp certify`: is a server with the patches the same server, and how fast is it?"""
