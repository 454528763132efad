"""Our own variables, with the sentences of the server."""

from __future__ import annotations

import pytest

from sglang_npu_pp.errors import SettingsError
from sglang_npu_pp.settings import Settings, load_settings
from sglang_npu_pp.tools.doctor import own_settings
from sglang_npu_pp.tools.doctor.findings import Level

WRONG = {
    "SGLANG_NPU_PP_WINDOW": "many",
    "SGLANG_NPU_PP_SLOT": "4",
    "SGLANG_NPU_PP_PORT": "70000",
}


def test_every_wrong_one_is_named_as_the_server_names_it() -> None:
    good = {"SGLANG_NPU_PP_SLOTS": "8", "UNRELATED": "x"}
    settings, findings = own_settings.check({**WRONG, **good})
    wrong = {finding.subject: finding.text for finding in findings if finding.level is Level.WRONG}
    assert set(wrong) == set(WRONG)
    for variable, text in WRONG.items():
        with pytest.raises(SettingsError) as caught:
            load_settings({variable: text})
        assert wrong[variable] == str(caught.value)
    assert settings == Settings(slots=8), "what is right is in force for the other examinations"


@pytest.mark.parametrize(
    ("mode", "level"), [(None, Level.NOTE), ("auto", Level.NOTE), ("require", Level.OK), ("0", Level.WARNING)]
)
def test_the_mode_is_said(mode: str | None, level: Level) -> None:
    _, findings = own_settings.check({} if mode is None else {"SGLANG_NPU_PP": mode})
    assert (findings[0].subject, findings[0].level) == ("mode", level)


@pytest.mark.parametrize(("slots", "gigabytes"), [("4", "1.9"), ("2", "0.9")])
def test_what_the_device_slots_take_is_said(slots: str, gigabytes: str) -> None:
    """Four slots of 235 MB each way were what a middle stage once grew to in silence."""
    _, findings = own_settings.check({"SGLANG_NPU_PP_SLOTS": slots})
    (found,) = [finding for finding in findings if finding.subject == "device memory"]
    assert f"{slots} slots to send and {slots} to receive" in found.text
    assert f"{gigabytes} GB on a middle stage for 8192 x 7168 in bfloat16" in found.text
