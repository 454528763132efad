"""Marks of tests that serve a release which the suite does not install."""

from __future__ import annotations

import pytest

from rig.releases import Release


def if_installed(release: Release) -> pytest.MarkDecorator:
    """Skips a test where that is not installed."""
    reason = f"SGLang {release.name} is not installed (make matrix)"
    return pytest.mark.skipif(not release.is_installed, reason=reason)
