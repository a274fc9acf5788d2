"""Every family against transformers: logits and greedy continuations that it computed, and the settings it stores."""

import functools
import json
import zipfile

import jax
import numpy as np
import pytest

import dantinox
from dantinox.hf.config import from_hf, to_hf
from dantinox.hf.families import FAMILIES
from dantinox.hf.weights import CONFIG, load_hf, save_hf
from dantinox.model.params import split_params
from tests.dantinox.hf.transformers_logits import CASES, FILE, NEW_TOKENS, TOKENS, make_model

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def frozen() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def test_file_has_every_case():
    assert zipfile.is_zipfile(FILE)
    assert frozen().keys() == {f"{case}: {what}" for case in CASES for what in ("logits", "greedy")}
    assert {case.partition(",")[0] for case in CASES} | {"gpt_oss"} == set(FAMILIES)  # gpt-oss has an oracle in NumPy


SHORT = ("llama", "mistral", "mixtral", "qwen3", "qwen3, windows", "qwen3_moe", "qwen3_moe, window", "afmoe")
LOGITS = [
    pytest.param(
        case,
        implementation,
        marks=() if case in SHORT or ("preset" in CASES[case] and implementation == "xla") else pytest.mark.slow,
    )
    for case in CASES
    for implementation in ("xla", "pallas")
]


@pytest.mark.parametrize(("case", "implementation"), LOGITS)
@pytest.mark.sampled(2)
def test_logits_equal_those_of_transformers(case, implementation):
    model_def, params = split_params(make_model(case, attn=implementation, moe=implementation))
    logits = quickly(lambda params: model_def.merge(params)(TOKENS))(params)
    expected = frozen()[f"{case}: logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("mistral", "qwen3") else pytest.mark.slow) for case in CASES]
)
@pytest.mark.sampled(2)
def test_greedy_continuation_equals_that_of_transformers(case):
    """With ring buffers of the windows."""
    (ids,) = dantinox.generate(make_model(case), TOKENS[:1].tolist(), max_new_tokens=NEW_TOKENS, temperature=0.0)
    assert list(ids) == frozen()[f"{case}: greedy"].tolist()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("llama", "mistral", "mixtral")])
@pytest.mark.sampled(2)
def test_folder_loads_and_saves_bit_for_bit(case, tmp_path):
    model = make_model(case)
    save_hf(model, tmp_path / "out")
    again = load_hf(tmp_path / "out")
    assert again.config == model.config
    save_hf(again, tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))["model_type"] == case.partition(",")[0]
    pairs = zip(split_params(model)[1].items(), split_params(again)[1].items(), strict=True)
    assert all(name == other and np.array_equal(x, y) for (name, x), (other, y) in pairs)


def stored(case="qwen3", **changes):
    return {name: x for name, x in (to_hf(make_model(case).config) | changes).items() if x != "absent"}


@pytest.mark.parametrize(
    ("changes", "window", "pattern"),
    [
        ({"sliding_window": 9}, None, "S"),
        ({"use_sliding_window": True, "sliding_window": 9}, None, "S"),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": "absent", "max_window_layers": 3}, 9, "LLLS"),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": "absent", "max_window_layers": 0}, 9, "S"),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": "absent"}, None, "S"),
        ({"layer_types": "absent", "sliding_window": "absent"}, None, "S"),
    ],
)
def test_window_of_qwen3_holds_only_with_its_switch(changes, window, pattern):
    config = from_hf(stored(**changes))
    assert (config.window if window else config.layer_window(0), config.window_pattern) == (window, pattern)


def test_experts_of_qwen3_have_two_names():
    changes = {"num_experts": "absent", "num_local_experts": 5}
    assert from_hf(stored("qwen3_moe", **changes)).n_experts == 5


def test_afmoe_of_which_all_layers_are_dense_has_no_experts():
    config = from_hf(stored("afmoe, wide", num_dense_layers=7, num_experts=6, intermediate_size=30))
    assert (config.n_experts, config.n_dense_layers, config.hidden, config.shared_expert) == (0, 0, 30, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared_experts": -1}, "num_shared_experts is -1; allowed: an integer, 0 or more"),
        ({"num_dense_layers": -1}, "num_dense_layers is -1; allowed: an integer, 0 or more"),
        ({"num_experts": 0}, "num_experts is 0; allowed: an integer, 1 or more"),
    ],
)
def test_wrong_number_of_afmoe_is_named_in_one_line(changes, message):
    with pytest.raises(dantinox.ConfigError, match=message):
        from_hf(stored("afmoe", **changes))


PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["conv", "full_attention"] * 2},
            "layer_types are conv, .*; allowed: sliding_attention or full_at",
        ),
        (
            {"layer_types": "absent"},
            "layer_types are conv, conv, full_attention, conv; allowed: sliding_attention or full_at",
        ),
        ({"rope_parameters": {"full_attention": PROPORTIONAL}}, "type 'proportional'; allowed: default, linear, yarn"),
        ({"rope_parameters": "absent"}, "type 'proportional'; allowed: default, linear, yarn"),
        ({"use_attention_gate": 1}, "use_attention_gate is 1; allowed: true or false"),
    ],
)
def test_what_lfm3_has_and_we_have_not_is_named_in_one_line(changes, message):
    with pytest.raises(dantinox.ConfigError, match=message) as error:
        from_hf(stored("lfm3", **changes))
    assert "\n" not in str(error.value)


def test_switches_of_lfm3_are_on_by_default():
    config = from_hf(stored("lfm3", use_attention_gate="absent", use_sandwich_norm=None))
    assert (config.attn_gate, config.norms) == ("head", "both")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; allowed: true or false"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\], which DantinoX does not support"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen4"}, "model_type is 'qwen4'; allowed: llama, mistral, mixtral, qwen3, qwen3_moe, gpt_oss"),
    ],
)
def test_unsupported_setting_is_named_in_one_line(changes, message):
    with pytest.raises(dantinox.ConfigError, match=message) as error:
        from_hf(stored("qwen3_moe", **changes))
    assert "\n" not in str(error.value)
