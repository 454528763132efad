"""All examinations, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import ascend_variables, loopback, network, own_settings, peer, versions
from .findings import Finding, Level, Section
from .layout import Layout
from .peer import PeerTest


def examine(environ: Mapping[str, str], layout: Layout, peer_test: PeerTest | None) -> Iterator[Section]:
    """One section a subject, each as soon as it is complete."""
    settings, findings = own_settings.check(environ)
    yield _section("Versions", lambda: versions.check(environ))
    yield _section("Patches and contracts", lambda: versions.check_patches(settings))
    yield Section("Settings of sglang-npu-pp", findings)
    yield _section("Variables of HCCL and torch_npu", lambda: ascend_variables.check(environ))
    yield _section("Interfaces, addresses and ports", lambda: network.check(settings, layout))
    yield _section("Loopback self-test of the host lane", lambda: loopback.check(settings))
    if peer_test is not None:
        yield _section("Link to the other node", lambda: peer.check(peer_test, settings))


def _section(title: str, check: Callable[[], object]) -> Section:
    """A failing check must not hide the results of others."""
    try:
        found = check()
    except Exception as error:
        text = f"could not be examined ({type(error).__name__}: {error}); report this."
        return Section(title, [Finding(Level.WRONG, "doctor", text)])
    if isinstance(found, tuple):
        findings, data = found
        return Section(title, findings, data)
    assert isinstance(found, list)
    return Section(title, found)
