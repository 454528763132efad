"""Packages of an Ascend machine that SGLang imports and that are not on PyPI, or need its driver.

A name can be imported from them. Calling it raises, unless `reference_kernels` has an implementation in plain
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

# Kernels for SGLang in Triton and AscendC; operators of single models; the graph compiler; CANN from Python;
# the engine that moves caches between servers; what Triton for Ascend has beside Triton.
MISSING = (
    *("sgl_kernel_npu", "custom_ops", "torchair", "acl", "memfabric_hybrid"),
    "triton.language.extra.cann",
)


def is_missing(name: str) -> bool:
    """Whether a module is one of these packages, or below one."""
    return any(name == package or name.startswith(f"{package}.") for package in MISSING)


class MissingPackage(ModuleType):
    """A module that has every name, as a function that raises."""

    __path__: list[str] = []  # noqa: RUF012 - a package: modules below it can be imported

    def __getattr__(self, name: str) -> Any:
        # Python and its tools probe for dunder names (__file__, __wrapped__): those must stay absent.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from . import reference_kernels, transfer_engine

        full_name = f"{self.__name__}.{name}"
        known = {**reference_kernels.PACKAGE_KERNELS, **transfer_engine.PACKAGE_KERNELS, **ANSWERED}
        return known.get(full_name) or missing_function(full_name)


class CompilerConfig:
    """torchair's settings of the graph compiler: SGLang fills them in, and nothing reads them here."""

    def __getattr__(self, name: str) -> CompilerConfig:
        if name.startswith("__"):
            raise AttributeError(name)
        section = CompilerConfig()
        setattr(self, name, section)
        return section


def missing_function(name: str) -> Callable[..., NoReturn]:
    """A function that raises `RuntimeError` with `name` when it is called."""

    def missing(*_arguments: object, **_options: object) -> NoReturn:
        raise RuntimeError(f"{name} is not on the simulated Ascend: this model or option needs a real one")

    missing.__name__ = missing.__qualname__ = name
    return missing


def get_npu_backend(*, compiler_config: CompilerConfig) -> Callable[..., NoReturn]:
    """torchair's backend for torch.compile: SGLang names it in decorators while it is imported."""
    return missing_function("the backend of torchair")


class Acl:
    """Of CANN from Python SGLang asks one thing while models are imported: which chip this is."""

    NPU_ARCHITECTURE = 601

    @staticmethod
    def get_device_info(device: int, attribute: int) -> tuple[int, int]:
        """(value, 0 for success). 2201 is the architecture of the Ascend 910B, which is what is simulated."""
        if attribute != Acl.NPU_ARCHITECTURE:
            missing_function(f"acl.rt.get_device_info(..., {attribute})")()
        return 2201, 0


ANSWERED: Mapping[str, Any] = {
    "torchair.configs.compiler_config.CompilerConfig": CompilerConfig,
    "torchair.get_npu_backend": get_npu_backend,
    "acl.rt": Acl,
}
