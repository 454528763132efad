"""The SGLang releases that the plugin knows: where they are installed, what each needs to serve on CPU here.

One release is in .venv itself. Others are parts beside it (scripts/environment/parts.py), which a server
finds through PYTHONPATH, before .venv's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rig.devices import SIMULATED, SIMULATED_BEFORE_0_5_15, cores_per_rank
from scripts.environment.parts import Part

IN_VENV = "0.5.21"
# Those beside it that the suite installs (scripts/environment/install.py).
OLDEST, EARLY, MIDDLE, NEWEST = "0.5.13.post1", "0.5.15", "0.5.18", "0.5.23"

# Up to 0.5.20 a grammar with SGLang's default backend, xgrammar, ends the server on CPU ("RuntimeError:
# Unsupported device: cpu").
LLGUIDANCE = ("--grammar-backend", "llguidance")

# The stages of 0.5.15 do not agree on when a grammar has been compiled. (And with llguidance it forbids
# tokens that the model has and the tokenizer has not to all requests of the batch.)
NO_GRAMMARS = dict.fromkeys(
    ("regex", "another regex", "json schema"),
    "makes an unpatched server hang when one stage has compiled the grammar before the other",
)

# The messages are those of 0.5.15, and of 0.5.18 and 0.5.20.
TOKEN_IDS_LOGPROB = {
    "token ids logprob": "ends the unpatched server when requests without token_ids_logprob share the batch "
    "(TypeError: 'NoneType' object cannot be interpreted as an integer; AttributeError: 'list' object has no "
    "attribute 'tolist')"
}


@dataclass(frozen=True)
class Release:
    """An SGLang release as a test server needs it."""

    name: str
    arguments: tuple[str, ...] = ()
    one_bind_per_stage: bool = False  # of SGLANG_CPU_OMP_THREADS_BIND; later releases take an entry a rank
    left_out: Mapping[str, str] = field(default_factory=dict)  # case of the battery -> why it is not asked
    alone: Mapping[str, str] = field(default_factory=dict)  # case of the battery -> why it gets no company
    one_graph_flag: bool = False  # for the sizes of all graphs

    @property
    def not_in_company(self) -> Mapping[str, str]:
        return {**self.left_out, **self.alone}

    @property
    def folder(self) -> Path | None:
        """What goes on PYTHONPATH; None for the release in .venv."""
        return None if self.part is None else self.part.folder

    @property
    def part(self) -> Part | None:
        """What installs it; None for the release in .venv."""
        return None if self.name == IN_VENV else Part(f"sglang-{self.name}")

    @property
    def is_installed(self) -> bool:
        return self.part is None or self.part.is_installed

    def environment(self, tp: int) -> Mapping[str, str]:
        return {"SGLANG_CPU_OMP_THREADS_BIND": cores_per_rank(tp)} if self.one_bind_per_stage else {}

    def device(self, name: str) -> str:
        """Its name in `rig.devices.DEVICES`."""
        return SIMULATED_BEFORE_0_5_15 if self.one_graph_flag and name == SIMULATED else name

    def pin(self, package: str) -> str:
        """The version of a package that this release asks for; it serves here with the one in .venv."""
        path = [str(self.folder)] if self.folder else sys.path
        sglang = next(iter(metadata.distributions(name="sglang", path=path)))
        for requirement in sglang.requires or ():
            if found := re.match(rf"{package}==([\w.]+)", requirement):
                return found[1]
        return "any"


RELEASES: Mapping[str, Release] = {
    release.name: release
    for release in (
        *(
            Release(
                name,
                one_bind_per_stage=True,
                left_out=NO_GRAMMARS,
                alone=TOKEN_IDS_LOGPROB,
                one_graph_flag=True,
            )
            for name in ("0.5.13.post1", "0.5.14")
        ),
        Release("0.5.15", one_bind_per_stage=True, left_out=NO_GRAMMARS, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.15.post1", one_bind_per_stage=True, left_out=NO_GRAMMARS, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.16", LLGUIDANCE, one_bind_per_stage=True, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.17", LLGUIDANCE, one_bind_per_stage=True, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.18", LLGUIDANCE, one_bind_per_stage=True, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.19", LLGUIDANCE, alone=TOKEN_IDS_LOGPROB),
        Release("0.5.20", LLGUIDANCE, alone=TOKEN_IDS_LOGPROB),
        Release(IN_VENV),
        Release("0.5.22"),
        Release("0.5.23"),
    )
}
