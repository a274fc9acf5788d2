"""Score questions with several choices: each choice by its log-likelihood after the question.

    end of document or bos   question   " " choice       one row per choice
                                        * * * *          only the tokens of the choice are scored

The choice with the largest sum is the answer; `normalised` divides each sum by the bytes of its choice, so that a long
one is not at a disadvantage.
"""

import json
import math
from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from dantinox.config.validation import check_int
from dantinox.data.tokenizer_protocol import Tokenizer, prompt_ids
from dantinox.distributed.inference import kernels_on, mesh_of
from dantinox.inference import generate, prefill
from dantinox.inference.scoring import _IGNORED_TARGET, _negative_log_probs
from dantinox.model.transformer import Transformer


class Question(NamedTuple):
    """A question.

    Attributes:
        context: the text before the choice.
        choices: at least two texts.
        answer: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


class ChoiceScore(NamedTuple):
    """Score of several questions.

    Attributes:
        questions: number of questions.
        accuracy: share of the questions whose right choice has the largest log-likelihood.
        normalised: the same with log-likelihoods per byte.
        chance: expected share of a draw.
        log_likelihoods: of each choice of each question, in nats.
    """

    questions: int
    accuracy: float
    normalised: float
    chance: float
    log_likelihoods: list[list[float]]

    def error(self, share: float) -> float:
        """Return the standard error of a share of the questions."""
        return math.sqrt(share * (1 - share) / self.questions)


def read_questions(path: str | Path) -> list[Question]:
    """Read a file with a JSON object per line: "context" or "question", "choices" and "answer", an index from 0.

    Raises:
        ValueError: the file has no questions, or a line is not one; the message names it.
        OSError: the file cannot be read.
    """
    questions = []
    for number, raw in enumerate(Path(path).read_bytes().splitlines(), 1):
        if raw.strip():
            try:
                questions.append(_question(json.loads(raw)))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number} is not UTF-8: byte {error.start}") from None
            except (ValueError, RecursionError) as error:
                what = "not a JSON object" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}: line {number}: {what}") from None
    if not questions:
        raise ValueError(f"{path} has no questions; allowed: a JSON object per line")
    return questions


def _question(record: Any) -> Question:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if ("context" in record) == ("question" in record):
        raise ValueError('has both or neither of "context" and "question"; allowed: one of them')
    context, choices, answer = (
        record.get("context", record.get("question")),
        record.get("choices"),
        record.get("answer"),
    )
    if not isinstance(context, str):
        raise ValueError(f"context is {context!r:.60}; allowed: text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(x, str) and x.strip() for x in choices):
        raise ValueError(f"choices is {choices!r:.60}; allowed: a list of two or more texts")
    return Question(context, tuple(choices), check_int("answer", answer, 0, len(choices)))


def score_choices(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], *, batch_size: int = 8
) -> ChoiceScore:
    """Score questions.

    A space is put between a context and a choice unless there is white space already.

    Args:
        model: the model.
        tokenizer: the tokenizer it was trained with.
        questions: at least one.
        batch_size: rows per batch; it changes the result by rounding only.

    Raises:
        ValueError: batch_size is invalid, or a question does not fit in the context of the model.
    """
    rows_per_batch = check_int("batch_size", batch_size, 1)
    limit = generate.context_limit(model.config)
    rows: list[tuple[np.ndarray, int]] = []  # ids, and how many of them are not of the choice
    for number, question in enumerate(questions, 1):
        for choice in question.choices:
            ids, start = _row(tokenizer, question.context, choice)
            if limit is not None and len(ids) - 1 > limit:
                reason = generate.why_context_limited(model.config)
                raise ValueError(
                    f"question {number} has {len(ids)} tokens; allowed: up to max_context {limit} + 1 ({reason})"
                )
            if ids.max() >= model.config.vocab_size:
                raise ValueError(f"question {number} has id {ids.max()}; allowed: below {model.config.vocab_size}")
            rows.append((ids, start))
    likelihoods = _log_likelihoods(model, rows, rows_per_batch, limit)
    by_question: list[list[float]] = []
    right, right_normalised = 0, 0
    for question in questions:
        sums = [likelihoods.pop(0) for _ in question.choices]
        per_byte = [nats / len(choice.encode()) for nats, choice in zip(sums, question.choices, strict=True)]
        by_question.append(sums)
        right += int(np.argmax(sums)) == question.answer
        right_normalised += int(np.argmax(per_byte)) == question.answer
    n = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / n
    return ChoiceScore(n, right / n, right_normalised / n, chance, by_question)


def _row(tokenizer: Tokenizer, context: str, choice: str) -> tuple[np.ndarray, int]:
    """Return the ids of a question with one choice, and where the tokens of the choice begin."""
    stripped = context.rstrip()  # white space belongs to the first word of the choice, as in running text
    between = context[len(stripped) :] or ("" if choice[0].isspace() or not stripped else " ")
    first = list(tokenizer.prefix) or [tokenizer.eos_id]
    before = prompt_ids(tokenizer, stripped) if tokenizer.prefix else [*first, *tokenizer.encode(stripped)]
    ids = np.array([*first, *tokenizer.encode(stripped + between + choice)], np.int32)
    # A token may hold the end of the context and the beginning of the choice.
    return ids, max(1, min(len(before), len(ids) - 1))


def _log_likelihoods(
    model: Transformer, rows: Sequence[tuple[np.ndarray, int]], rows_per_batch: int, limit: int | None
) -> list[float]:
    """Return the log-likelihood of the tokens from `start` on of each row (ids, start), in nats."""
    graph, weights = nnx.split(model)
    mesh = mesh_of(weights)
    result = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for batch in batched(by_length, rows_per_batch):
        longest = max(len(rows[i][0]) for i in batch) - 1
        width = prefill.round_up_to_bucket(longest, prefill.SMALLEST_PROMPT, limit)
        inputs = np.zeros((rows_per_batch, width), np.int32)
        targets = np.full((rows_per_batch, width), _IGNORED_TARGET, np.int32)
        for row, i in enumerate(batch):
            ids, start = rows[i]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, start - 1 : len(ids) - 1] = ids[start:]
        with kernels_on(mesh):
            losses = np.asarray(_negative_log_probs(graph, weights, inputs, targets))
        for row, i in enumerate(batch):
            result[i] = -float(losses[row][targets[row] != _IGNORED_TARGET].sum(dtype=np.float64))
    return result
