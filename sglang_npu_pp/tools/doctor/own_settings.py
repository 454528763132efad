"""Environment variables of this package, with the server's error sentences."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import SettingsError
from ...settings import PREFIX, Settings, load_settings
from ...transport.device_lane import slot_bytes_for
from .findings import Finding, Level


def check(environ: Mapping[str, str]) -> tuple[Settings, list[Finding]]:
    """The settings in force (defaults for invalid ones), and a finding for each variable."""
    good: dict[str, str] = {}
    findings: list[Finding] = []
    for variable, text in sorted(environ.items()):
        if variable != PREFIX and not variable.startswith(f"{PREFIX}_"):
            continue
        try:
            load_settings({variable: text})
        except SettingsError as error:
            findings.append(Finding(Level.WRONG, variable, str(error)))
        else:
            good[variable] = text
            findings.append(Finding(Level.OK, variable, text))
    settings = load_settings(good)
    return settings, [_mode(settings), *findings, _device_slots(settings)]


def _device_slots(settings: Settings) -> Finding:
    tokens, hidden = 8192, 7168
    middle_stage = 2 * settings.slots * slot_bytes_for(tokens, hidden, item_bytes=2)
    return Finding(
        Level.NOTE,
        "device memory",
        f"on an accelerator {settings.slots} slots to send and {settings.slots} to receive are reserved "
        "before SGLang measures its KV pool, each chunked_prefill_size x hidden size x dtype x 2 tensors / "
        f"TP ranks: {middle_stage / 1e9:.1f} GB on a middle stage for {tokens} x {hidden} in bfloat16 and "
        "TP 1",
    )


def _mode(settings: Settings) -> Finding:
    if settings.mode == "0":
        return Finding(
            Level.WARNING, "mode", f"{PREFIX}=0: the plugin is off, SGLang serves as upstream does"
        )
    if settings.mode == "auto":
        return Finding(
            Level.NOTE,
            "mode",
            "auto: an SGLang that is not known is served as it is, with a line in the log; in production "
            f"set {PREFIX}=require, which refuses to start instead",
        )
    return Finding(Level.OK, "mode", "require: the server does not start on upstream's path")
