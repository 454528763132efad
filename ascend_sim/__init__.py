"""A simulated Ascend: CANN and HCCL on the CPU, under the unmodified torch_npu. See README.md."""
