"""The committed profiles of compiled kernels: regressions, text and contents."""

import json
from pathlib import Path

import pytest

from bench.aot import profile

ROOT = Path(__file__).parents[3]

GPU_KERNEL = {"name": "k", "registers": 128, "spill_bytes": 0, "blocks": 2, "wgmma": 32, "tcgen05": 0}
TPU_KERNEL = {"name": "k", "mxu_share": 0.5, "spills": 4, "fills": 4}


def row(kernel=GPU_KERNEL, *, status="compiled", temp=1000, **change):
    kernel = kernel | change
    totals = {n: kernel[n] for n in ("spill_bytes", "spills", "fills") if n in kernel}
    return {"status": status, "reason": "why", "temp_bytes": temp, "totals": totals, "kernels": [kernel]}


def executed(per_pair, **change):
    return row(TPU_KERNEL, bundles_per_pair=per_pair, **change) | {"bundles_per_pair": {"forward": per_pair}}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (row(), row(status="failed"), "compiled before, now failed: why"),
        (row(), row(status="refused"), "now refused"),
        (row(), row(temp=1051), "temp bytes 1,000 -> 1,051"),
        (row(temp=0), row(temp=1), "temp bytes 0 -> 1"),
        (row(), row(spill_bytes=8), "spill bytes 0 -> 8"),
        (
            row(),
            row(registers=136, blocks=1),
            "2 blocks per SM (128 registers) -> 1 blocks per SM (136 registers)",
        ),
        (row(), row(wgmma=0), "wgmma is gone"),
        (row(TPU_KERNEL), row(TPU_KERNEL, mxu_share=0.49), "MXU share 50.0% -> 49.0%"),
        (row(TPU_KERNEL), row(TPU_KERNEL, fills=5), "fill slots 4 -> 5"),
        (row(TPU_KERNEL, bundles=100), row(TPU_KERNEL, bundles=102), "k: bundles 100 -> 102"),
        (executed(0.003), executed(0.0031), "forward: bundles per pair 0.003 -> 0.0031"),
        (row() | {"xla_cycles": 1000}, row() | {"xla_cycles": 1051}, "cycles of XLA 1,000 -> 1,051"),
    ],
)
def test_each_kind_of_regression_is_reported(old, new, says):
    lines = profile.regressions({"a": old}, {"a": new})
    assert lines
    assert any(says in line for line in lines), lines
    assert all(line.startswith("a: ") for line in lines)
    assert not profile.regressions({"a": new}, {"a": old}), "and the way back is none"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (row(), row()),
        (row(), row(temp=1050)),
        (row(), row(registers=64, blocks=4)),
        (row(), row(registers=130)),  # no step of occupancy
        (row(status="failed"), row()),
        (row(TPU_KERNEL), row(TPU_KERNEL, mxu_share=0.9, spills=0, fills=0)),
        # A longer program with a lower share, and no slower.
        (executed(0.003, bundles=9), executed(0.003, bundles=99, mxu_share=0.1)),
        (row(), row() | {"xla_cycles": 1000}),  # not counted before
    ],
    ids=[
        "equal",
        "temp bytes",
        "fewer registers",
        "more registers",
        "failed before",
        "better schedule",
        "more bundles",
        "new count",
    ],
)
def test_no_regression_is_reported_without_one(old, new):
    assert profile.regressions({"a": old, "gone": row()}, {"a": new, "added": row()}) == []


def test_kernels_with_equal_names_are_compared_in_order():
    pair = row() | {"kernels": [GPU_KERNEL, GPU_KERNEL | {"registers": 168, "blocks": 1}]}
    swapped = pair | {"kernels": pair["kernels"][::-1]}
    assert profile.regressions({"a": pair}, {"a": swapped}) == []
    worse = pair | {"kernels": [GPU_KERNEL | {"blocks": 1}, pair["kernels"][1]]}
    assert profile.regressions({"a": pair}, {"a": worse})


def test_profile_text_is_stable_and_keeps_rows_not_recompiled(tmp_path):
    versions = {"jax": "1"}
    first = profile.merge(None, "h100", versions, {"b": row(), "a": row()})
    file = profile.path(tmp_path / "new", "h100")
    profile.save(file, first)
    assert profile.load(file) == json.loads(file.read_text()) == first
    assert file.read_text() == profile.dump(profile.merge(None, "h100", versions, {"a": row(), "b": row()}))
    second = profile.merge(profile.load(file), "h100", versions, {"a": row(temp=5)})
    assert second["rows"]["a"]["temp_bytes"] == 5
    assert second["rows"]["b"] == row()
    assert list(profile.merge(first, "h100", {"jax": "2"}, {"a": row()})["rows"]) == ["a"]
    assert profile.load(tmp_path / "none.json") is None
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a profile"):
        profile.load(file)


def test_committed_profiles_contain_no_path_and_no_time():
    files = sorted((ROOT / "profiles/aot").glob("*.json"))
    for file in files:
        text = file.read_text()
        document = json.loads(text)
        assert document["target"] == file.stem
        assert profile.dump(document) == text
        assert "/tmp" not in text
        assert "site-packages" not in text
        assert not any("seconds" in row for row in document["rows"].values())
