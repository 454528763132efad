"""Upstream's pipeline parallelism and ours, side by side over a link of a chosen delay and rate."""
