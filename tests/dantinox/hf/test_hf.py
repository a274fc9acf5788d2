"""Hugging Face weights: bit-exact saving and loading, and logits equal to those of transformers."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors
from flax import nnx

import dantinox
from dantinox.cli import export
from dantinox.data.tokenizer import CharTokenizer, load_tokenizer
from dantinox.hf.config import from_hf
from dantinox.hf.weights import CONFIG, INDEX, WEIGHTS, load_hf, save_hf
from dantinox.model import params
from tests.dantinox.inference.test_generate import V, build

LAYOUTS = {
    "llama": dict(n_kv_heads=1, rope_scaling="llama3", rope_factor=4.0, rope_original_context=12, tie_embeddings=False),
    "mistral": dict(window=5, head_dim=6, mlp_ratio=2.625, rope_theta=500.0, norm_eps=1e-5, dropout=0.1),
    "mixtral": dict(
        window=7, n_experts=4, experts_per_token=3, tie_embeddings=False, router_aux_loss_coef=0.02, dtype="bfloat16"
    ),
    "gpt_oss": dict(
        n_layers=3,
        window=7,
        window_pattern="LLS",
        n_experts=4,
        attn_bias=True,
        attn_sinks=True,
        moe_bias=True,
        mlp="swiglu_clamped",
        mlp_limit=3.0,
        mlp_alpha=1.5,
        rope_scaling="yarn",
        rope_factor=2.0,
        rope_original_context=24,
        rope_truncate=False,
    ),
}


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in params.split_params(model)[1].items()}


def logits(model, tokens) -> np.ndarray:
    graph, weights = nnx.split(model)
    return np.asarray(jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, tokens))


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sampled(2)
def test_saved_model_loads_bit_for_bit(layout, shard_bytes, tmp_path):
    model = build(**LAYOUTS[layout])
    files = save_hf(model, tmp_path / "out", shard_bytes=shard_bytes)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["model_type"] == layout
    assert (len(files) > 1) == (shard_bytes == 4000) == (tmp_path / "out" / INDEX).is_file()
    again = dantinox.load_hf(tmp_path / "out")
    assert again.config == model.config
    mine, other = arrays(model), arrays(again)
    assert mine.keys() == other.keys()
    assert all(np.array_equal(mine[name].view(np.uint32), other[name].view(np.uint32)) for name in mine)
    assert os.listdir(tmp_path) == ["out"]


def test_ntk_scaled_base_is_saved_as_rope_theta(tmp_path):
    model, tokens = build(n_layers=1, rope_scaling="ntk", rope_factor=4.0), np.arange(12)[None] % V
    save_hf(model, tmp_path / "out")
    again = load_hf(tmp_path / "out")
    assert again.config.rope_scaling == "none" and again.config.rope_theta > 40_000
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("changes", "layout", "lost"),
    [
        (dict(attn_gate="head"), None, "llama layout cannot represent attn_gate 'head'"),
        (dict(qk_norm=True, attn_gate="elementwise"), None, "qwen3 layout cannot represent attn_gate 'elementwise'"),
        (dict(qk_norm=True), "llama", "llama layout cannot represent qk_norm True"),
        (dict(attn_softcap=5.0, window=4), None, "mistral layout cannot represent attn_softcap 5.0"),
        (dict(logit_softcap=5.0), None, "logit_softcap 5.0"),
        (dict(pos_encoding="learned"), None, "pos_encoding 'learned'"),
        (dict(pos_encoding="none"), None, "pos_encoding 'none'"),
        (dict(mlp="gelu"), None, "mlp 'gelu'"),
        (dict(n_experts=2, shared_expert=True), None, "mixtral layout cannot represent shared_expert True"),
        (dict(window=4, window_pattern="SL"), "mistral", "window_pattern 'SL' with window 4"),
        (dict(window=4), "llama", "llama layout cannot represent window 4"),
        (dict(dim=34, head_dim=8), "llama", "llama layout cannot represent dim 34 with n_heads 4"),
        (dict(n_experts=2), "mistral", "mistral layout cannot represent n_experts 2"),
        (dict(), "mixtral", "mixtral layout cannot represent n_experts 0"),
        (dict(attn_bias=True), "llama", "llama layout cannot represent attn_bias True"),
        (dict(n_experts=2, moe_bias=True), None, "mixtral layout cannot represent moe_bias True"),
        (dict(mlp="swiglu_clamped"), None, "llama layout cannot represent mlp 'swiglu_clamped'"),
        (dict(attn_sinks=True), None, "gpt_oss layout cannot represent mlp 'swiglu', moe_bias False, n_experts 0"),
        (dict(rope_pattern="RN"), "llama", "llama layout cannot represent rope_pattern 'RN'"),
        (dict(window=4, rope_theta_windowed=9.0), "smollm3", "smollm3 layout cannot represent rope_theta_windowed 9.0"),
        (dict(attn_sinks=True), "llama", "llama layout cannot represent attn_sinks True"),
        (dict(), "gpt2", "layout is 'gpt2'; allowed: llama, mistral, mixtral, qwen3, qwen3_moe, gpt_oss"),
    ],
)
def test_feature_missing_in_the_layout_raises_with_its_name(changes, layout, lost, tmp_path):
    with pytest.raises(dantinox.ConfigError, match=lost) as error:
        save_hf(build(**changes), tmp_path / "out", layout)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_save_does_not_overwrite_files(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            save_hf(build(n_layers=1), place)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    model = build(n_layers=1, tie_embeddings=False)
    save_hf(model, folder / "whole")
    save_hf(model, folder / "sharded", shard_bytes=4000)
    return folder


K = "model.layers.0.self_attn.k_proj.weight"


def retensored(change):
    def damage(folder):
        tensors = safetensors.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.save_file(tensors, folder / WEIGHTS)

    return damage


def reconfigured(**changes):
    def damage(folder):
        held = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({name: x for name, x in held.items() if x != "gone"}))

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def second(folder):
    return sorted(folder.glob("model-00002-*"))[0]


DAMAGE = {
    "missing tensor": ("whole", retensored(lambda t: t.pop(K)), f"{K} is missing"),
    "two missing": ("whole", retensored(lambda t: [t.pop(K), t.pop("lm_head.weight")]), r"\(and 1 more\) is missing"),
    "unknown tensor": (
        "whole",
        retensored(lambda t: t.update({K[:-6] + "bias": t[K][0]})),
        "k_proj.bias is not a tensor",
    ),
    "shape": ("whole", retensored(lambda t: t.update({K: t[K][:-1]})), rf"{K} has shape \[7, 16\]; allowed: \[8, 16\]"),
    "turned": ("whole", retensored(lambda t: t.update({K: t[K].T.copy()})), r"has shape \[16, 8\]; allowed: \[8, 16\]"),
    "half": ("whole", retensored(lambda t: t.update({K: t[K].astype(np.float16)})), f"{K} is F16; allowed: F32"),
    "integers": ("whole", retensored(lambda t: t.update({K: t[K].astype(np.int32)})), f"{K} is I32; allowed: F32"),
    "truncated": ("whole", cut(WEIGHTS, -1), f"{WEIGHTS} is damaged"),
    "header": ("whole", cut(WEIGHTS, 20), f"{WEIGHTS} is damaged"),
    "empty": ("whole", cut(WEIGHTS, 0), f"{WEIGHTS} is damaged"),
    "no weights": ("whole", lambda folder: (folder / WEIGHTS).unlink(), f"has neither {WEIGHTS} nor {INDEX}"),
    "no config": ("whole", lambda folder: (folder / CONFIG).unlink(), "No such file"),
    "config": ("whole", cut(CONFIG, 50), f"{CONFIG} is damaged: expected a JSON object"),
    "no shard": ("sharded", lambda folder: second(folder).unlink(), "model-00002-of-"),
    "cut shard": ("sharded", lambda folder: cut(second(folder).name, -9)(folder), "safetensors is damaged"),
    "no index": ("sharded", lambda folder: (folder / INDEX).unlink(), f"has neither {WEIGHTS} nor {INDEX}"),
    "index": ("sharded", lambda folder: (folder / INDEX).write_text('{"weight_map": 3}'), "weight_map must map"),
    "outside": (
        "sharded",
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "weight_map must map",
    ),
    "moved": (
        "sharded",
        lambda folder: shutil.copy(sorted(folder.glob("model-00001-*"))[0], second(folder)),
        f"is missing, although {INDEX} lists it",
    ),
    "family": ("whole", reconfigured(model_type="gpt2"), "model_type is 'gpt2'; allowed: llama, mistral, mixtral"),
    "no width": ("whole", reconfigured(hidden_size="gone"), "hidden_size is None; allowed: an integer"),
    "text": ("whole", reconfigured(hidden_size="16"), "hidden_size is '16'; allowed: an integer"),
    "heads": ("whole", reconfigured(num_key_value_heads=3), "n_heads must be a multiple of n_kv_heads"),
    "bias": ("whole", reconfigured(attention_bias=True), "attention_bias is True, which DantinoX does not support"),
    "gelu": ("whole", reconfigured(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "dynamic": ("whole", reconfigured(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling has type 'dyn"),
    "yarn": (
        "whole",
        reconfigured(rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": 16}),
        "beta_fast is 16, which DantinoX does not support; allowed: 32",
    ),
    "quantized": ("whole", reconfigured(quantization_config={"bits": 4}), "quantization_config is"),
    "mixed windows": (
        "whole",
        reconfigured(model_type="mistral", sliding_window=4, layer_types=["full_attention", "sliding_attention"]),
        "layer_types are full_attention, sliding_attention",
    ),
    "tied": ("whole", reconfigured(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.sampled(2)
def test_damaged_folder_raises_one_line(name, written, tmp_path):
    source, damage, message = DAMAGE[name]
    shutil.copytree(written / source, tmp_path / "here")
    damage(tmp_path / "here")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_hf(tmp_path / "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name", "org/name does not exist; load_hf takes a local folder; download a model of the Hugging Face Hub"),
        ("gpt2", "gpt2 does not exist; load_hf takes a local folder; download"),
        ("a/b/c", "a/b/c does not exist; load_hf takes a local folder$"),
        ("./here", "./here does not exist; load_hf takes a local folder$"),
        ("file", "file is a file; load_hf takes the folder that holds config.json"),
        ("run", "run is a run of DantinoX; dantinox.load loads it"),
        ("empty", "empty/config.json"),
    ],
)
def test_name_that_is_no_exported_folder_is_refused_in_plain_words(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("run/config.yaml", "file"):
        (tmp_path / file).touch()
    with pytest.raises((FileNotFoundError, NotADirectoryError), match=message) as error:
        load_hf(name)
    assert "\n" not in str(error.value)


def test_half_precision_and_older_key_names_load(written, tmp_path):
    shutil.copytree(written / "whole", tmp_path / "here")
    want, bfloat16 = arrays(load_hf(written / "whole")), jax.numpy.bfloat16

    def narrow(tensors):
        tensors.update({name: x.astype(bfloat16) for name, x in tensors.items()})
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    retensored(narrow)(tmp_path / "here")
    reconfigured(dtype="gone", torch_dtype="bfloat16", dantinox="gone", head_dim="gone")(tmp_path / "here")
    model = load_hf(tmp_path / "here", attn="xla")
    assert model.config.dtype == "bfloat16" and model.config.attn == "xla"
    for name, x in arrays(model).items():
        np.testing.assert_array_equal(x, want[name].astype(bfloat16).astype(np.float32))
    with pytest.raises(dantinox.ConfigError, match="unknown setting 'atn'; did you mean 'attn'"):
        load_hf(tmp_path / "here", atn="xla")


def test_minimal_config_gets_the_defaults():
    small = dict(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    config = from_hf(small | dict(model_type="mixtral", max_position_embeddings=64, sliding_window=3))
    assert (config.n_kv_heads, config.resolved_head_dim, config.hidden, config.n_experts) == (2, 4, 12, 8)
    assert (config.tie_embeddings, config.window, config.rope_theta, config.rope_scaling) == (False, 3, 1e6, "none")
    assert from_hf(small | dict(model_type="llama", max_position_embeddings=64, sliding_window=3)).window is None


# --- beside transformers -------------------------------------------------------------------------

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    attn_implementation="eager",
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, original_max_position_embeddings=16)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
THEIRS = {
    "plain": ("Llama", dict(num_key_value_heads=4)),
    "grouped, tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "multi-query, wide heads": ("Llama", dict(num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-3)),
    "theta": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, num_key_value_heads=2)),
    "no window": ("Mistral", dict(num_key_value_heads=2, sliding_window=None)),
    "window": ("Mistral", dict(num_key_value_heads=2, sliding_window=7, tie_word_embeddings=True)),
    "window of one": ("Mistral", dict(num_key_value_heads=4, sliding_window=1)),
    "experts": ("Mixtral", dict(num_key_value_heads=2, num_local_experts=4, sliding_window=None)),
    "experts, window": ("Mixtral", dict(num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=3)),
    "sinks, window": ("GptOss", dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
}
THEIRS["sinks, window"][1].update(sliding_window=9, swiglu_limit=2.0, rope_parameters=YARN | dict(truncate=False))
THEIRS["experts, window"][1].update(sliding_window=9, tie_word_embeddings=True, rope_parameters=YARN, head_dim=8)


@pytest.mark.parametrize("name", THEIRS)
def test_logits_match_transformers(name, tmp_path):
    """There and back: what transformers writes and we read, what we write and transformers reads."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, changes = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    theirs = kind(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if "window" in name else "1GB")
    assert (tmp_path / "theirs" / INDEX).is_file() == ("window" in name)
    ours = load_hf(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))

    def run(model) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)).logits.numpy()

    want = run(theirs)
    assert np.std(want) > 0.5
    np.testing.assert_allclose(logits(ours, tokens), want, rtol=1e-5, atol=1e-5)
    save_hf(ours, tmp_path / "ours", config.model_type, shard_bytes=20_000)
    back = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(run(back), want)


# --- the program ---------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, tmp_path):
    """dantinox.cli.export.main in an empty folder, with models that never were trained."""
    tokenizer = CharTokenizer("é€")
    models = {
        "mine": build(n_layers=1, window=6, vocab_size=tokenizer.vocab_size),
        "gated": build(n_layers=1, attn_gate="head", vocab_size=tokenizer.vocab_size),
    }

    def read_config(run):
        if run.name not in models:
            raise FileNotFoundError(f"run {run} does not exist")
        return dantinox.Config(model=models[run.name].config, train=dantinox.Config().train.__class__(seq_len=8))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dantinox.checkpoint.load.read_config", read_config)
    monkeypatch.setattr("dantinox.checkpoint.load.load", lambda run: (models[run.name], tokenizer))
    return lambda *words: export.main(list(words)), models


def test_export_program_writes_a_folder_that_load_hf_reads(program, capsys):
    run, models = program
    assert run("mine", "--out", "out/deep") == 0
    assert capsys.readouterr().out.startswith("out/deep: mistral, ")
    assert arrays(load_hf("out/deep")).keys() == arrays(models["mine"]).keys()
    assert load_tokenizer("out/deep/dantinox").encode("é€").tolist() == [257, 258]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--run", "mine"], "out is missing"),
        (["--run", "none", "--out", "out"], "run runs/none does not exist"),
        (["--run", "gated", "--out", "out"], "the llama layout cannot represent attn_gate 'head'"),
        (["--run", "mine", "--out", "out", "--layout", "llama"], "cannot represent window 6"),
        (["--run", "mine", "--out", "out", "--layout", "gpt2"], "gpt2"),
        (["--run", "mine", "--out", "out", "--shard-mb", "0"], "shard_mb is 0"),
        (["--run", "mine", "--out", "full"], "full: exists and is not empty"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_2(program, capsys, tmp_path, flags, word):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(SystemExit) as stop:
        program[0](*flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("dantinox-export: error: ") and err.count("\n") == 1 and word in err
    assert os.listdir() == ["full"]
