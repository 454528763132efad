"""Ranks of a server on this node, in SGLang's numbering."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The server's --tp-size, --pp-size, --nnodes, --node-rank, --dist-init-addr, --dp-size (replicas, not
    data-parallel attention)."""

    tp_size: int = 1
    pp_size: int = 2
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dp_size: int = 1

    def __post_init__(self) -> None:
        sizes = (self.tp_size, self.pp_size, self.nnodes, self.dp_size)
        if min(sizes) < 1 or not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                "--tp-size, --pp-size, --dp-size and --nnodes are at least 1, --node-rank is below --nnodes."
            )
        if self.world_size % self.nnodes:
            raise ValueError(f"{self.world_size} ranks cannot be spread evenly over {self.nnodes} nodes.")
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("with --nnodes the server needs --dist-init-addr HOST:PORT; give it here, too.")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def ranks_here(self) -> list[int]:
        """World ranks of this node, counted on over replicas; numbered stage by stage, nodes in order."""
        each = self.world_size // self.nnodes
        first = self.node_rank * each
        return [
            replica * self.world_size + rank
            for replica in range(self.dp_size)
            for rank in range(first, first + each)
        ]
