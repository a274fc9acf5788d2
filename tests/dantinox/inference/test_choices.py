"""Questions with several choices are scored as a plain loop over full logits scores them."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from dantinox.cli import evaluate
from dantinox.data.tokenizer import CharTokenizer, load_tokenizer
from dantinox.hf.weights import save_hf
from dantinox.inference.choices import Question, read_questions, score_choices
from tests.dantinox.data.test_hf_tokenizer import byte_fallback
from tests.dantinox.inference.test_generate import build

QUESTIONS = [
    Question("the cat", ("sat", "the mat é", "so"), 1),
    Question("the cat ", ("sat", "of"), 0),
    Question("", ("the", "cats and so on and on and so on and on"), 1),
    Question("the", (" cat", "\ncat"), 0),
]


def loop(forward, tokenizer, question: Question) -> list[float]:
    """Log-likelihoods by NumPy."""
    first, sums = list(tokenizer.prefix) or [tokenizer.eos_id], []
    context = question.context.rstrip()
    for choice in question.choices:
        space = "" if choice[0].isspace() or not context else " "
        before = [*first, *tokenizer.encode(context)]
        ids = [*first, *tokenizer.encode(context + (question.context[len(context) :] or space) + choice)]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        z = np.asarray(forward(padded))[0].astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        sums.append(sum(log_p[i - 1, ids[i]] for i in range(len(before), len(ids))))
    return sums


@pytest.mark.parametrize("kind", ["char", pytest.param("byte_fallback", marks=pytest.mark.slow)])
def test_scores_equal_a_plain_loop(kind, tmp_path):
    tokenizer = CharTokenizer("é€")
    if kind == "byte_fallback":
        byte_fallback().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
    model = build(n_layers=1, vocab_size=tokenizer.vocab_size + 5, max_context=64)
    graph, weights = nnx.split(model)
    forward = jax.jit(lambda tokens: nnx.merge(graph, weights)(tokens))
    want = [loop(forward, tokenizer, question) for question in QUESTIONS]
    for batch_size in (16,) if kind == "char" else (2, 16):
        score = score_choices(model, tokenizer, QUESTIONS, batch_size=batch_size)
        for mine, other in zip(score.log_likelihoods, want, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5)
    right = [np.argmax(sums) == q.answer for sums, q in zip(want, QUESTIONS)]
    sizes = [[len(choice.encode()) for choice in q.choices] for q in QUESTIONS]
    normalised = [np.argmax(np.divide(sums, n)) == q.answer for sums, n, q in zip(want, sizes, QUESTIONS)]
    assert (score.accuracy, score.normalised) == (np.mean(right), np.mean(normalised))
    assert score.chance == pytest.approx((1 / 3 + 3 / 2) / 4) and score.error(0.25) == pytest.approx(0.2165, abs=1e-4)
    with pytest.raises(ValueError, match="question 2 has 72 tokens; allowed: up to max_context 64"):
        score_choices(model, CharTokenizer(""), [QUESTIONS[1], Question("a" * 69, ("b", "c"), 0)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"choices": ["a", "b"], "answer": 0}', 'has both or neither of "context" and "question"'),
        ('{"question": "a", "context": "b", "choices": ["a", "b"], "answer": 0}', "has both or neither"),
        ('{"question": 3, "choices": ["a", "b"], "answer": 0}', "context is 3; allowed: text"),
        ('{"question": "a", "choices": ["a"], "answer": 0}', "allowed: a list of two or more texts"),
        ('{"question": "a", "choices": ["a", ""], "answer": 0}', "allowed: a list of two or more texts"),
        ('{"question": "a", "choices": ["a", "b"], "answer": 2}', "answer is 2; allowed: an integer from 0 to 1"),
        ('{"question": "a", "choices": ["a", "b"], "answer": "b"}', "answer is 'b'; allowed: an integer"),
        ('{"question": "a", "choices": ["a", "b"], "answer": true}', "answer is True; allowed: an integer"),
        (b'{"question": "\xff"}', "is not UTF-8"),
    ],
)
def test_line_that_is_no_question_is_named(line, message, tmp_path):
    good = b'{"question": "a", "choices": ["a", "b"], "answer": 0}\n\n'
    (tmp_path / "file.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=r"file\.jsonl: line 3") as error:
        read_questions(tmp_path / "file.jsonl")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_program_prints_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer("é€")
    save_hf(model := build(n_layers=1, vocab_size=259, max_context=64), tmp_path / "hf", tokenizer=tokenizer)
    lines = [json.dumps({"context": q.context, "choices": q.choices, "answer": q.answer}) for q in QUESTIONS]
    (tmp_path / "file.jsonl").write_text("\n".join(lines), "utf-8")
    evaluate.main(["hf", "--choices", "file.jsonl", "--json"])
    record = json.loads(capsys.readouterr().out)
    score = score_choices(model, tokenizer, QUESTIONS)
    for mine, other in zip(record["log_likelihoods"], score.log_likelihoods, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)
    assert (record["questions"], record["accuracy"], record["from"]) == (4, score.accuracy, "hf")
    evaluate.main(["hf", "--choices", "file.jsonl"])
    assert capsys.readouterr().out.startswith("questions            file.jsonl: 4, 0.4583 right by chance\naccuracy  ")
    (tmp_path / "empty.jsonl").write_text("\n")
    for flags, message in (
        (["--choices", "file.jsonl", "--data", "x"], "data and choices are both given; allowed: one of them"),
        (["--choices", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["--choices", "empty.jsonl"], "empty.jsonl has no questions; allowed: a JSON object per line"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--from", "hf", *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err
