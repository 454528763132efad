"""What a process needs to run torch_npu on the simulated Ascend."""

from __future__ import annotations

import os

from ascend_sim import build


def environment(*, devices: int, memory_mb: int = 4096, **settings: str | int) -> dict[str, str]:
    """The variables of such a process, to be set before it starts (the loader reads LD_LIBRARY_PATH once).

    `devices` of `memory_mb` MiB each. Further settings by their names in lower case and without the prefix:
    `poison=1` is ASCEND_SIM_POISON=1, and so on for `eager_bytes`, `link_us`, `link_mb_per_s`. A name that
    begins with `hccl_` is CANN's own, as `hccl_exec_timeout` in seconds.
    """
    libraries = build.build()
    package = build.torch_npu()
    assert package is not None
    return {
        "LD_LIBRARY_PATH": _path_before(str(libraries), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _path_before(str(package.parent), "PYTHONPATH"),
        "ASCEND_HOME_PATH": str(libraries / build.HOME),
        "ASCEND_OPP_PATH": str(libraries / build.HOME / "opp"),
        "ASCEND_SIM_DEVICES": str(devices),
        "ASCEND_SIM_MEMORY_MB": str(memory_mb),
        **{_variable(name): str(value) for name, value in settings.items()},
    }


def _path_before(first: str, variable: str) -> str:
    """The search path in a variable, with one more directory that is looked at first."""
    others = [path for path in os.environ.get(variable, "").split(os.pathsep) if path and path != first]
    return os.pathsep.join([first, *others])


def _variable(name: str) -> str:
    return name.upper() if name.startswith("hccl_") else f"ASCEND_SIM_{name.upper()}"
