"""Which ranks of a server run on this node, as SGLang numbers them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What the server is started with: --tp-size, --pp-size, --nnodes, --node-rank, --dist-init-addr."""

    tp_size: int = 1
    pp_size: int = 2
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None

    def __post_init__(self) -> None:
        if min(self.tp_size, self.pp_size, self.nnodes) < 1 or not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                "--tp-size, --pp-size and --nnodes are at least 1, --node-rank is below --nnodes."
            )
        if self.world_size % self.nnodes:
            raise ValueError(f"{self.world_size} ranks cannot be spread evenly over {self.nnodes} nodes.")
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("with --nnodes the server needs --dist-init-addr HOST:PORT; give it here, too.")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def ranks_here(self) -> range:
        """World ranks of this node: they are numbered stage by stage, and nodes take them in order."""
        each = self.world_size // self.nnodes
        return range(self.node_rank * each, (self.node_rank + 1) * each)
