"""Environment variables: parsed once, refused with a sentence that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.errors import SettingsError
from sglang_npu_pp.settings import Settings, load_settings


def test_nothing_set_gives_the_defaults() -> None:
    assert load_settings({}) == Settings()
    assert Settings().mode == "auto"


def test_values_are_parsed() -> None:
    settings = load_settings(
        {
            "SGLANG_NPU_PP": "require",
            "SGLANG_NPU_PP_WINDOW": " 32 ",
            "SGLANG_NPU_PP_PEER_TIMEOUT_S": "2.5",
            "SGLANG_NPU_PP_IPC_DIR": "/run/lanes",
            "UNRELATED": "many",
            "SGLANG_NPU_PPX": "another project's",
        }
    )
    assert (settings.mode, settings.window, settings.peer_timeout_s) == ("require", 32, 2.5)
    assert settings.ipc_dir == Path("/run/lanes")


@pytest.mark.parametrize(
    ("variable", "text", "sentence"),
    [
        ("SGLANG_NPU_PP", "on", "SGLANG_NPU_PP='on' must be one of auto, require, 0."),
        ("SGLANG_NPU_PP_WINDOW", "3", "must be a whole number of messages from 4 to 4096."),
        ("SGLANG_NPU_PP_WINDOW", "8.5", "must be a whole number of messages from 4 to 4096."),
        ("SGLANG_NPU_PP_PEER_TIMEOUT_S", "nan", "must be a number of seconds from 0.5 to 86400."),
        ("SGLANG_NPU_PP_PORT", "70000", "must be a whole number of a TCP port from 0 to 65535."),
        ("SGLANG_NPU_PP_CHECKSUM", "", "must be one of small, full."),
    ],
)
def test_a_value_that_cannot_be_used_is_named(variable: str, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({variable: text})
    assert str(caught.value).startswith(f"{variable}={text!r} ")
    assert str(caught.value).endswith(sentence)


def test_a_variable_that_does_not_exist_is_named() -> None:
    with pytest.raises(SettingsError, match="^SGLANG_NPU_PP_SLOT is not a setting of sglang-npu-pp"):
        load_settings({"SGLANG_NPU_PP_SLOT": "4"})


@given(text=st.text(max_size=12), variable=st.sampled_from(["", "_WINDOW", "_PORT", "_WAIT_LIMIT_S"]))
def test_any_text_is_parsed_or_refused(text: str, variable: str) -> None:
    try:
        load_settings({"SGLANG_NPU_PP" + variable: text})
    except SettingsError as error:
        assert str(error).startswith("SGLANG_NPU_PP" + variable)


def test_what_ranks_must_agree_on() -> None:
    shared = Settings(window=8, port=5000).shared_values()
    assert shared["SGLANG_NPU_PP_WINDOW"] == "8"
    assert "SGLANG_NPU_PP_PORT" not in shared
