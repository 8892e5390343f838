from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_stream.config import Figure, Profile, load_profile, profile_names
from sglang_stream.errors import InvalidRequest
from sglang_stream.policy.cost import Copying, Decode, Prefill, Rest

NAMES = ["a40", "h100-tp2", "h200", "h200-tp2"]

MEASURED = Profile(
    name="mine",
    kind="measured",
    machine="a machine",
    model="a model",
    dtype="float32",
    pass_ms=Figure(50.0, "ten times the base"),
    kv_bytes_per_token=Figure(8192.0, "told by the worker"),
    kv_tokens=Figure(10_000, "told by the worker"),
    prefill=Figure(Prefill(0.005, 1e-4, 1e-8), "25 forwards", 0.03),
    swap_out=Figure(Copying(0.001, 1e-6), "12 copies", 0.05),
    swap_in=Figure(Copying(0.002, 2e-6), "12 copies", 0.04),
    decode=Figure(Decode(0.005, 1e-4, 1e-8), "6 steps", 0.1),
    call=Figure(0.01, "10 requests"),
    call_rest=Figure(Rest(((0.0, 0.0), (1.0, 0.02))), "13 requests"),
    samples="mine.samples.jsonl",
)


def test_these_profiles_come_with_the_package() -> None:
    assert profile_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_derived_and_tells_where_each_figure_is_from(name: str) -> None:
    profile = load_profile(name)
    assert (profile.name, profile.kind, profile.model) == (name, "derived", "Llama-3.1-8B")
    figures = [f for f in profile.__struct_fields__ if isinstance(getattr(profile, f), Figure)]
    assert len(figures) == 9 + (profile.call is not None)
    assert all(len(getattr(profile, field).source) > 20 for field in figures)
    assert profile.kv_bytes_per_token.value == 131072
    assert profile.cost.prefill == profile.prefill.value
    assert profile.cost.swap_is_cheaper(8192)


def test_the_more_machine_the_less_time() -> None:
    profiles = {name: load_profile(name) for name in NAMES}
    order = ["h200-tp2", "h100-tp2", "h200", "a40"]
    prefills = [profiles[name].prefill.value.seconds(8192, 2048) for name in order]
    assert prefills == sorted(prefills)
    pools = [profiles[name].kv_tokens.value for name in order]
    assert pools == sorted(pools, reverse=True)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(MEASURED.to_json())
    assert load_profile(str(file)) == MEASURED


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"--profile h300: .*a40, h100-tp2.*calibrate") as e:
        load_profile("h300")
    assert e.value.param == "--profile"


def changed(*path: str, value: Any) -> str:
    content = json.loads(MEASURED.to_json())
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "no profile"),
        ("{}", "missing required field `name`"),
        (changed("kind", value="guessed"), r"guessed.*\$\.kind"),
        (changed("speed", value=1), "unknown field `speed`"),
        (changed("prefill", "value", "base_s", value="5 ms"), r"\$\.prefill\.value\.base_s"),
        (changed("prefill", "value", "per_token_s", value=-1e-5), "at least 0"),
        (changed("swap_in", "value", value={"base_s": 0, "per_token_s": 0}), "not all 0"),
        (changed("call_rest", "value", "points", value=[]), "ascend from 0"),
        (changed("call_rest", "value", "points", value=[[0.1, 0]]), "ascend from 0"),
        (changed("call_rest", "value", "points", value=[[0, 0], [1, 2], [1, 3]]), "ascend"),
        (changed("call_rest", "value", "points", value=[[0, 0], [1, -2]]), "at least 0"),
        (changed("pass_ms", "value", value=0), "pass_ms"),
        (changed("kv_tokens", "value", value=-5), "kv_tokens"),
    ],
)
def test_a_file_that_is_no_profile_is_explained(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=f"--profile {file}: .*{reason}"):
        load_profile(str(file))


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"--profile .*directory"):
        load_profile(str(tmp_path))
