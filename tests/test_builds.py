"""A build is known by its functions, seam by seam and feature by feature, whatever it calls itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_npu_pp.builds import CORE, Build, Known, Seam, build_of_this_process, read_build
from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.patches import SEAMS, features, load_contracts, seams_for, seams_here, sglang_release
from sglang_npu_pp.patching import Patch

CONTRACTS = load_contracts()
EACH_RELEASE = pytest.mark.parametrize("release", CONTRACTS)


def patch(target: str, **options: Any) -> Patch:
    return Patch(target=target, wrapper=len, why="w", how="h", upstream="u", plan="p", **options)


# Two seams of the core and two features; releases 1.0, 2.0 and 3.0.
STEP = patch("m:step", relies_on=("m:helper",))
ADDED = patch("m:added", adds=True)
OLD = patch("m:old", optional=True, relies_on=("m:helper",))
UNLESS = patch("m:start", unless="m:new")
LOOP = Seam("loop", CORE, (STEP, ADDED))
TIMES = Seam("times", CORE, (OLD, UNLESS))
EXTRA = Seam("extra", "extras", (patch("m:extra"),))
MORE = Seam("more", "extras", (patch("m:more"),))
FOUR = (LOOP, TIMES, EXTRA, MORE)

FUNCTIONS: Mapping[str, Mapping[str, str | None]] = {
    "1.0": {
        "m:step": "a",
        "m:helper": "a",
        "m:old": "a",
        "m:start": "a",
        "m:new": None,
        "m:extra": "a",
        "m:more": "a",
    },
    "2.0": {
        "m:step": "b",
        "m:helper": "a",
        "m:old": None,
        "m:start": "a",
        "m:new": "a",
        "m:extra": "a",
        "m:more": "b",
    },
    "3.0": {
        "m:step": "c",
        "m:helper": "b",
        "m:old": None,
        "m:start": "b",
        "m:new": "a",
        "m:extra": "b",
        "m:more": "b",
    },
}


def known(label: str, base: str = "1.0", **changes: str | None) -> Known:
    """Of a build with the functions of release `base`, and `changes`."""
    functions = {**FUNCTIONS[base], "m:added": None, **{f"m:{name}": to for name, to in changes.items()}}
    return Known(Build(label, functions), FOUR, FUNCTIONS)


def unreadable(target: str, sentence: str) -> Known:
    return Known(Build("1.1", {**FUNCTIONS["1.0"], "m:added": None}, {target: sentence}), FOUR, FUNCTIONS)


def targets(found: Known) -> list[str]:
    return [each.target.removeprefix("m:") for each in found.patches]


@pytest.mark.parametrize("label", ["1.0", "1.1", "1.0.post1", "0.0.0.dev0+g12", "nightly"])
def test_the_name_is_a_label(label: str) -> None:
    found = known(label)
    assert found.in_force == (CORE, "extras")
    assert targets(found) == ["step", "added", "old", "start", "extra", "more"]
    content = "" if label == "1.0" else " (functions of 1.0)"
    assert found.sentence == f"6 patches in force for SGLang {label}{content}, all features"


def test_a_release_gets_the_patches_that_it_needs() -> None:
    assert targets(known("2.0", "2.0")) == ["step", "added", "extra", "more"]


def test_each_seam_may_be_as_in_another_release() -> None:
    found = known("2.1", "2.0", more="a", step="a")
    assert dict(found.releases) == {
        "loop": ("1.0",),
        "times": ("2.0", "3.0"),
        "extra": ("1.0", "2.0"),
        "more": ("1.0",),
    }
    assert (
        found.sentence == "4 patches in force for SGLang 2.1 (functions of 1.0, times of 3.0), all features"
    )


def test_the_functions_of_a_seam_are_as_in_one_release() -> None:
    """Each of these is known, but no release has them together."""
    found = known("1.1", step="a", helper="b")
    assert found.in_force == ()
    assert found.patches == ()
    assert (
        str(found.refusal)
        == "SGLang 1.1 is not a build that sglang-npu-pp knows: m:helper differs from SGLang 1.0."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "x"},
        {"helper": "x"},
        {"step": None},
        {"helper": None},
        {"added": "x"},
        {"start": "x"},
        {"old": "x"},
    ],
)
def test_what_the_core_does_not_know_keeps_everything_off(changes: dict[str, str | None]) -> None:
    found = known("1.0", "1.0", **changes)
    assert CORE in found.missing
    assert found.in_force == ()
    (name,) = changes
    assert f"m:{name} differs from SGLang 1.0 (another plugin, or an edited file?)" in str(found.refusal)


def test_a_function_that_a_release_should_not_have_counts() -> None:
    assert CORE in known("1.0", new="x").missing
    assert CORE in known("2.0", "2.0", old="x").missing


def test_a_feature_is_in_force_with_all_its_seams_or_not_at_all() -> None:
    found = known("1.1", extra="x")
    assert found.in_force == (CORE,)
    assert targets(found) == ["step", "added", "old", "start"]
    in_force = "4 patches in force for SGLang 1.1 (functions of 1.0)"
    assert found.sentence == f"{in_force}, not for extras (m:extra differs from SGLang 1.0)"


def test_an_edited_release_is_compared_with_itself_and_another_build_with_the_nearest() -> None:
    assert known("3.0", "1.0", step="x").nearest == "3.0"
    assert known("3.1", "1.0", step="x").nearest == "1.0"
    assert known("3.1", "3.0", step="x").nearest == "3.0"


def test_what_cannot_be_read_is_said_as_it_is() -> None:
    sentence = "m:step is wrapped by something that is not SGLang's (other.py, line 3; another plugin?)."
    found = unreadable("m:step", sentence)
    assert sentence.rstrip(".") in str(found.refusal)
    assert "differ" not in str(found.refusal)


def test_long_lists_are_cut() -> None:
    found = known("1.1", step="x", helper="x", start="x", new="x", old="x", added="x")
    assert "m:added, m:helper, m:new, m:old, 1 more differ from SGLang 2.0." in str(found.refusal)


def test_the_digest_is_of_the_functions_and_not_of_the_name() -> None:
    assert known("1.0").build.digest == known("1.1").build.digest
    assert known("1.0").build.digest != known("1.0", step="x").build.digest
    assert known("1.0").build.digest != unreadable("m:step", "wrapped").build.digest


def test_a_function_that_cannot_be_read_does_not_hide_the_others() -> None:
    def read(target: str) -> str | None:
        if target == "m:helper":
            raise ContractError("m:helper is wrapped.")
        return None if target == "m:added" else "a"

    build = read_build("1.0", [LOOP], read)
    assert build.functions == {"m:added": None, "m:step": "a"}
    assert build.unreadable == {"m:helper": "m:helper is wrapped."}


# --- our seams ------------------------------------------------------------------------------------


def of_release(
    release: str, label: str | None = None, device: str | None = None, **changes: str | None
) -> Known:
    """What is known of a release whose functions are changed: those whose targets end so."""
    seams = seams_for(device)
    functions = {target: CONTRACTS[release].get(target) for seam in seams for target in seam.targets}
    for name, found in changes.items():
        (target,) = (target for target in functions if target.endswith((f".{name}", f":{name}")))
        functions[target] = found
    return Known(Build(label or release, functions), seams, CONTRACTS)


def test_the_installed_sglang_is_known() -> None:
    seams = seams_here()
    found = Known(build_of_this_process(sglang_release(), seams), seams, CONTRACTS)
    assert found.missing == {}
    assert found.sentence.endswith(f"SGLang {sglang_release()}, all features")


@EACH_RELEASE
@pytest.mark.parametrize("label", ["0.5.24.dev7+gabc", "0.5.99"])
def test_every_known_release_is_in_force_under_any_name(release: str, label: str) -> None:
    found = of_release(release, label, "npu")
    assert found.missing == {}
    assert found.patches == of_release(release, device="npu").patches
    assert f"SGLang {label} (functions of {release})" in found.sentence


@EACH_RELEASE
@pytest.mark.parametrize(
    ("function", "feature"),
    [
        ("send_kv_chunk", features.DISAGGREGATION),
        ("event_loop_pp_disagg_prefill", features.DISAGGREGATION),
        ("event_loop_pp_disagg_decode", features.DISAGGREGATION),
        ("try_ensure_parallel_info", features.BOOTSTRAP),
        ("prepare_mlp_sync_batch_raw", features.DP_ATTENTION),
        ("try_overlap_load_lora", features.LORA),
        ("UnifiedRadixCache._pp_sync", features.HIERARCHICAL_CACHE),
        ("init_forward_metadata", features.NPU_BACKEND),
        ("_launch_scheduler_processes", features.END),
    ],
)
def test_a_change_in_one_feature_takes_away_that_feature_only(
    release: str, function: str, feature: str
) -> None:
    found = of_release(release, "0.5.99", "npu", **{function: "0123456789abcdef"})
    assert list(found.missing) == [feature]
    assert set(found.in_force) == {each.name for each in features.FEATURES} - {feature}
    of_feature = {patch.target for seam in SEAMS if seam.feature == feature for patch in seam.patches}
    assert of_feature.isdisjoint(patch.target for patch in found.patches)


@EACH_RELEASE
@pytest.mark.parametrize("function", ["_pp_launch_batch", "recv_requests", "point_to_point_pyobj"])
def test_a_change_in_the_core_takes_away_everything(release: str, function: str) -> None:
    found = of_release(release, "0.5.99", **{function: "0123456789abcdef"})
    assert CORE in found.missing
    assert found.patches == ()


def test_every_seam_belongs_to_a_feature_that_exists() -> None:
    assert [
        each.name for each in features.FEATURES if each.name not in {seam.feature for seam in SEAMS}
    ] == []
    assert {seam.feature for seam in SEAMS} <= {each.name for each in features.FEATURES}
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)
    for seam in SEAMS:
        assert {each.wrapper.__module__.rpartition(".")[2] for each in seam.patches} == {seam.name}


def test_seams_of_another_device_are_left_out() -> None:
    of_npus = {"attention", "npu_graphs", "prefill"}
    assert {seam.name for seam in SEAMS} - {seam.name for seam in seams_here()} == of_npus
    assert seams_for("npu") == SEAMS


# --- what a server uses -------------------------------------------------------------------------------


PLAIN = {
    "pp_size": 2,
    "enable_dp_attention": False,
    "disaggregation_mode": "null",
    "speculative_algorithm": None,
    "enable_lora": None,
    "enable_hierarchical_cache": False,
    "lora_paths": None,
}


@pytest.mark.parametrize(
    ("arguments", "used"),
    [
        ({}, {features.AHEAD}),
        ({"pp_size": 1}, None),
        ({"enable_dp_attention": True}, {features.DP_ATTENTION}),
        ({"pp_size": 1, "enable_dp_attention": True}, None),
        (
            {"disaggregation_mode": "prefill"},
            {features.AHEAD, features.BOOTSTRAP, features.DISAGGREGATION},
        ),
        (
            {"enable_pd_role_switch": True},
            {features.AHEAD, features.BOOTSTRAP, features.DISAGGREGATION},
        ),
        ({"pp_size": 1, "disaggregation_mode": "decode"}, {features.BOOTSTRAP}),
        ({"enable_lora": True}, {features.AHEAD, features.LORA}),
        ({"lora_paths": ["a=b"]}, {features.AHEAD, features.LORA}),
        ({"enable_hierarchical_cache": True}, {features.AHEAD, features.HIERARCHICAL_CACHE}),
        ({"pp_size": 1, "enable_hierarchical_cache": True}, None),
        ({"speculative_algorithm": "EAGLE"}, {features.AHEAD, features.SPECULATION}),
        ({"pp_size": 1, "speculative_algorithm": "EAGLE"}, None),
    ],
)
def test_what_a_server_uses(arguments: dict[str, Any], used: set[str] | None) -> None:
    server = SimpleNamespace(**{**PLAIN, **arguments})
    found = {feature.name for feature in features.FEATURES if feature.is_used(server)}
    always = {CORE, features.NPU_BACKEND, features.END} if server.pp_size > 1 else set()
    assert found == always | (used or set())


def test_a_server_that_does_not_use_what_is_missing_does_not_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_known", of_release("0.5.21", "0.5.99", send_kv_chunk="x"))
    assert features.unknown_to_a_server(SimpleNamespace(**PLAIN)) is None
    prefill = SimpleNamespace(**{**PLAIN, "disaggregation_mode": "prefill"})
    sentence = features.unknown_to_a_server(prefill)
    assert sentence is not None
    assert sentence.startswith(
        "this SGLang is not known for disaggregation (sglang.srt.disaggregation.prefill:"
    )
    assert sentence.endswith(".send_kv_chunk differs from SGLang 0.5.21)")
    assert features.in_force() == {name: name != features.DISAGGREGATION for name in features.in_force()}


def test_a_server_is_patched_without_our_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_known", of_release("0.5.21", "0.5.99", _check_processes="x"))
    server = SimpleNamespace(**PLAIN)
    assert features.unknown_to_a_server(server) is None
    sentence = features.unknown_to_a_server(server, separable=True)
    assert sentence is not None
    assert (
        "end of a server (sglang.srt.utils.watchdog:SubprocessWatchdog._check_processes differs" in sentence
    )
