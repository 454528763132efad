"""Environments of this repository: what is wanted of them, locked (`make lock`), installed and checked."""
