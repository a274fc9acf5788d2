"""Scoring a text: each token once, compared with an oracle without windows; the program and its error messages."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.cli import evaluate
from dantinox.data.corpus import Document
from dantinox.data.tokenizer import CharTokenizer
from dantinox.inference import scoring
from tests.dantinox.inference.test_generate import build

TEXTS = ["perché no? €", "a", "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura"]
TOKENIZER = CharTokenizer("é")  # the € is spelled with three tokens


@pytest.fixture(scope="module")
def model():
    return build(n_layers=1, vocab_size=TOKENIZER.vocab_size, max_context=80)


@pytest.fixture(scope="module")
def log_p(model):
    """log p [V] of what follows ids [T], float64, T <= 80; nothing here knows of windows or batches."""
    run = jax.jit(model.__call__)

    def of(ids):
        padded = jnp.asarray([list(ids) + [5] * (80 - len(ids))], jnp.int32)
        logits = np.asarray(run(padded), np.float64)[0, len(ids) - 1]
        return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())

    return of


@pytest.mark.parametrize(("context", "stride"), [(80, None), (8, 3), (8, 8), (8, 1)])
@pytest.mark.sampled(2)
def test_each_token_is_scored_once_with_the_stated_context(model, log_p, context, stride):
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [0, *TOKENIZER.encode(text)]
        for i in range(1, len(ids)):
            first = 0  # the first place of a window, which are a stride apart, that reaches token i
            while first + context < i:
                first += stride or context // 2
            nats -= log_p(ids[first:i])[ids[i]]
            tokens += 1
    documents = [Document("", text) for text in TEXTS]
    score = scoring.score_documents(model, TOKENIZER, documents, context=context, stride=stride, batch_size=5)
    assert (score.documents, score.tokens, score.bytes) == (3, tokens, sum(len(t.encode()) for t in TEXTS))
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)


def test_context_beyond_max_context_requires_windows(model):
    documents = [Document("", TEXTS[0])]
    with pytest.raises(
        ValueError, match=r"^context is 81; allowed: 1 to max_context 80 \(every layer has full attention\)"
    ):
        scoring.score_documents(model, TOKENIZER, documents, context=81)
    windowed = build(n_layers=1, vocab_size=TOKENIZER.vocab_size, window=4)
    assert scoring.score_documents(windowed, TOKENIZER, documents, context=1000).tokens == 14


@pytest.fixture
def program(model, monkeypatch, tmp_path):
    def load(run, **overrides):
        if run.name == "none":
            raise FileNotFoundError(f"run {run} does not exist")
        return model, TOKENIZER

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dantinox.checkpoint.load.load", load)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    return evaluate.main


def test_table_and_json_agree(program, capsys):
    words = ["--run", "mine", "--data", "texts", "--context", "8", "--batch-size", "5"]
    assert program(words) == 0
    table = capsys.readouterr()
    assert program([*words, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["context"] == 8 and held["stride"] == 4 and held["tokens"] == 14 + 1 + len(TEXTS[2])
    assert held["loss"] == pytest.approx(held["nats"] / held["tokens"])
    for name in ("loss", "perplexity"):
        assert f"{name:14} {held[name]:.4f}" in table.out
    assert f"bits per byte  {held['bits_per_byte']:.4f}" in table.out
    assert "context 8, stride 4" in table.out and "tokens/s" in table.err


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e6])
def test_json_and_table_of_a_text_without_a_finite_score_are_valid(nats, program, capsys, monkeypatch):
    score = scoring.Score(documents=1, tokens=2, bytes=2, nats=nats, context=8, stride=4)
    monkeypatch.setattr(evaluate, "score_documents", lambda *args, **options: score)
    refuse = lambda constant: pytest.fail(constant)
    assert program(["mine", "texts", "--json"]) == 0
    held = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert held["perplexity"] is None and held["loss"] == (nats / 2 if math.isfinite(nats) else None)
    assert program(["mine", "texts"]) == 0 and "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "data is missing; give --data"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "empty.txt"], "no text in empty.txt"),
        (["--data", "texts", "--run", "none"], "does not exist"),
        (["--data", "texts", "--context", "0"], "context is 0; allowed: an integer, 1 or more"),
        (["--data", "texts", "--context", "99"], "context is 99; allowed: 1 to max_context 80"),
        (["--data", "texts", "--context", "8", "--stride", "9"], "stride is 9; allowed: an integer from 1 to 8"),
        (["--data", "texts", "--stride", "0"], "stride is 0"),
        (["--data", "texts", "--batch-size", "0"], "batch_size is 0"),
        (["--data", "texts", "--contxt", "3"], "--context"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_2(program, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        program(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("dantinox-evaluate: error: ") and err.count("\n") == 1 and word in err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in out for flag in ("--data", "--context", "--stride", "--batch-size"))
