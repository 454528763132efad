"""All environment variables of this package, parsed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import SettingsError

PREFIX = "SGLANG_NPU_PP"


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return parse


def _number(kind: type[int] | type[float], low: float, high: float, unit: str) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # a NaN fails the comparison too
            noun = "a whole number" if kind is int else "a number"
            raise ValueError(f"must be {noun} of {unit} from {low:g} to {high:g}")
        return value

    return parse


def _optional_path(text: str) -> Path | None:
    return Path(text) if text else None


def _setting(
    suffix: str, default: str, parse: Callable[[str], Any], meaning: str, *, shared: bool = False
) -> Any:
    """A field from SGLANG_NPU_PP<suffix>; `shared`: must be equal on all ranks."""
    metadata = {
        "variable": PREFIX + suffix,
        "default": default,
        "parse": parse,
        "meaning": meaning,
        "shared": shared,
    }
    return field(default_factory=lambda: parse(default), metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parsed settings. `Settings()` holds the defaults."""

    mode: str = _setting(
        "",
        "auto",
        _choice("auto", "require", "0"),
        "auto: activate when this SGLang is known, else leave it untouched; "
        "require: refuse to start instead; 0: off",
    )
    proxy_lane: str = _setting(
        "_PROXY_LANE",
        "auto",
        _choice("auto", "host", "device"),
        "lane of the proxy tensors; auto: device lane for device tensors, host lane for host tensors",
        shared=True,
    )
    dp_metadata: str = _setting(
        "_DP_METADATA",
        "device",
        _choice("device", "host"),
        "how data-parallel attention ranks gather their metadata; device: on the device SGLang serves on; "
        "host: over gloo",
        shared=True,
    )
    host_transport: str = _setting(
        "_HOST_TRANSPORT",
        "auto",
        _choice("auto", "ipc", "tcp"),
        "auto: ipc between ranks of one node, encrypted TCP between nodes; tcp: TCP everywhere",
        shared=True,
    )
    host: str = _setting(
        "_HOST",
        "",
        str,
        "address, interface or host name of this node at which the host lane listens for other nodes; empty: "
        "all addresses that could be right, those that gloo would use first",
    )
    port: int = _setting(
        "_PORT",
        "0",
        _number(int, 0, 65535, "a TCP port"),
        "first port of the host lane, plus the rank, counted on over data-parallel replicas; "
        "0: any free port",
    )
    ipc_dir: Path | None = _setting(
        "_IPC_DIR",
        "",
        _optional_path,
        "directory in which the ipc sockets are made; empty: the temporary one, or another if it is too long",
    )
    window: int = _setting(
        "_WINDOW",
        "16",
        _number(int, 4, 4096, "messages"),
        "messages of one kind that may be in flight to one peer before the sender waits; raised when the "
        "microbatch slots need more",
        shared=True,
    )
    window_mb: int = _setting(
        "_WINDOW_MB",
        "512",
        _number(int, 1, 65536, "MiB"),
        "bytes (MiB) of one kind that may be in flight to one peer before the sender waits; one message for "
        "each microbatch slot may be, whatever its size",
        shared=True,
    )
    slots: int = _setting(
        "_SLOTS",
        "4",
        _number(int, 2, 64, "slots"),
        "send slots and receive slots of the device lane, each with room for the largest prefill, reserved "
        "at start",
        shared=True,
    )
    pin_memory: str = _setting(
        "_PIN_MEMORY",
        "1",
        _choice("0", "1"),
        "1: copies between host and device go through pinned memory; 0: through plain memory, by a copy that "
        "blocks, in another thread or on another stream than the forwards",
    )
    early_send: str = _setting(
        "_EARLY_SEND",
        "1",
        _choice("0", "1"),
        "1: proxies and KV chunks are sent right behind their launch; 0: where upstream sends them, proxies "
        "at the end of the iteration and chunks in the next one",
        shared=True,
    )
    ahead: str = _setting(
        "_AHEAD",
        "auto",
        _choice("auto", "1", "0"),
        "auto: a forward is prepared while its proxies are on their way, and on stage 0 the next decode of a "
        "microbatch while its tokens are; that is launched before they are processed where SGLang serves on "
        "a device; 1: so on a CPU, too; 0: each in upstream's order",
        shared=True,
    )
    early_receive: str = _setting(
        "_EARLY_RECEIVE",
        "1",
        _choice("0", "1"),
        "1: receives of the device lane are posted when their header arrives; 0: when they are waited for",
        shared=True,
    )
    checksum: str = _setting(
        "_CHECKSUM",
        "small",
        _choice("small", "full"),
        "small: CRC over headers and frames up to 64 KiB; full: over every frame",
        shared=True,
    )
    peer_timeout_s: float = _setting(
        "_PEER_TIMEOUT_S",
        "5",
        _number(float, 0.5, 86400, "seconds"),
        "a peer that is silent for so long is lost, and the process ends with an error",
    )
    wait_limit_s: float = _setting(
        "_WAIT_LIMIT_S",
        "1800",
        _number(float, 1, 86400, "seconds"),
        "longest wait for one message of a peer that is alive",
    )
    start_limit_s: float = _setting(
        "_START_LIMIT_S",
        "60",
        _number(float, 1, 3600, "seconds"),
        "longest wait at start for the other ranks to agree and to connect",
    )
    bootstrap_limit_s: float = _setting(
        "_BOOTSTRAP_LIMIT_S",
        "60",
        _number(float, 1, 3600, "seconds"),
        "longest time in which a disaggregated server tries to get one answer from a bootstrap server; "
        "then the requests that need it fail",
    )
    idle_sleep: str = _setting(
        "_IDLE_SLEEP",
        "1",
        _choice("0", "1"),
        "1: an idle server waits for requests instead of spinning; 0: as upstream",
    )
    certificates: Path | None = _setting(
        "_CERTIFICATES",
        "",
        _optional_path,
        "folder of the certificates that certify writes, read where this SGLang is not known; empty: "
        "sglang-npu-pp/certificates in the user's configuration folder (XDG_CONFIG_HOME, or ~/.config)",
    )
    trace_dir: Path | None = _setting(
        "_TRACE",
        "",
        _optional_path,
        "write each rank's trace (posts, waits, launches) into this directory at exit and on SIGUSR2",
    )
    telemetry_dir: Path | None = _setting(
        "_TELEMETRY_DIR",
        "",
        _optional_path,
        "write each rank's telemetry into this directory at exit and on SIGUSR2",
    )

    @property
    def window_bytes(self) -> int:
        return self.window_mb << 20

    def shared_values(self) -> dict[str, str]:
        """Settings that must be equal on all ranks, by variable."""
        return {
            f.metadata["variable"]: str(getattr(self, f.name)) for f in fields(self) if f.metadata["shared"]
        }


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Parse `environ` (default: the process environment).

    Raises SettingsError for an invalid value, and for an unknown variable with our prefix (probably
    misspelt).
    """
    environ = os.environ if environ is None else environ
    by_variable = {f.metadata["variable"]: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if variable != PREFIX and not variable.startswith(PREFIX + "_"):
            continue
        setting = by_variable.get(variable)
        if setting is None:
            known = ", ".join(sorted(by_variable))
            raise SettingsError(f"{variable} is not a setting of sglang-npu-pp; there are {known}.")
        try:
            values[setting.name] = setting.metadata["parse"](text.strip())
        except ValueError as error:
            raise SettingsError(f"{variable}={text!r} {error}.") from None
    return Settings(**values)
