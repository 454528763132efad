"""Python runs this when it starts: an import of SGLang says that torch is missing, its files can be found.

SGLang uses torch while it is imported, and gets half way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _FilesOfSGLang(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(fullname, path, target) if fullname == "sglang" else None
        if found is not None:
            found.loader = self
        return found

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


sys.meta_path.insert(0, _FilesOfSGLang())
