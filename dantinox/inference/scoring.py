"""How well a model predicts a text.

Every token of every document is scored once, given the end of document before it and what a window shows:

    document      0 a b c d e f g h i        0 = end of document, not scored itself
    window 1      . * * * * *                context 5, stride 2: what is read, * = what is scored
    window 2          . . . . * *            each token sees at least context - stride tokens,
    window 3              . . . . * *        but at the beginning of its document
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox.config.validation import check_int
from dantinox.data.corpus import Document
from dantinox.data.tokenizer import Tokenizer
from dantinox.inference import generate
from dantinox.model.transformer import Transformer


class Score(NamedTuple):
    """How well a text was predicted.

    Attributes:
        documents, tokens, bytes: what was scored; bytes are of UTF-8.
        nats: -log p of the whole text.
        context, stride: of the windows.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss; inf where that is past the largest float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of the text takes: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score all of `documents`, each on its own.

    Args:
        context: tokens read at once; None: the model's max_context.
        stride: tokens a window moves on, 1 to context; None: half of it.
        batch_size: windows read at once; changes nothing but for rounding.

    Raises:
        ValueError: a size is not allowed, there is no text, or the tokenizer is not the model's.
    """
    limit = generate.context_limit(model.config)
    context = model.config.max_context if context is None else check_int("context", context, 1)
    if limit is not None and context > limit:
        raise ValueError(
            f"context is {context}; allowed: 1 to max_context {limit}, as {generate.why_context_limited(model.config)}"
        )
    stride = max(1, context // 2) if stride is None else check_int("stride", stride, 1, context + 1)
    rows = check_int("batch_size", batch_size, 1)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {model.config.vocab_size}"
        )
    texts = [np.append(np.int32(tokenizer.eos_id), tokenizer.encode(document.text)) for document in documents]
    if sum(len(text) - 1 for text in texts) == 0:
        raise ValueError("there is no text to score")
    # No window is longer than it must be; one size, one program.
    longest = max(len(text) for text in texts) - 1
    width = min(context, 1 << (longest - 1).bit_length())
    graph, weights = nnx.split(model)
    nats, tokens = 0.0, 0
    for group in batched((pair for text in texts for pair in _windows(text, context, stride, width)), rows):
        blank = (np.zeros(width, np.int32), np.full(width, _NOT_SCORED, np.int32))
        inputs, targets = (np.stack(x) for x in zip(*group, *[blank] * (rows - len(group)), strict=True))
        scored = targets != _NOT_SCORED
        nats += np.asarray(_nats(graph, weights, inputs, targets))[scored].sum(dtype=np.float64)
        tokens += int(scored.sum())
    return Score(len(texts), tokens, sum(document.size for document in documents), float(nats), context, stride)


_NOT_SCORED = -1  # in place of a target


def _windows(text: np.ndarray, context: int, stride: int, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), int32 [width], that score each of text[1:] once."""
    done = 0  # targets scored
    for start in range(0, len(text), stride):
        if done == len(text) - 1:
            return
        end = min(start + context, len(text) - 1)
        inputs, targets = np.zeros(width, np.int32), np.full(width, _NOT_SCORED, np.int32)
        inputs[: end - start] = text[start:end]
        targets[done - start : end - start] = text[done + 1 : end + 1]
        done = end
        yield inputs, targets


@functools.partial(jax.jit, static_argnums=0)
def _nats(graph: Any, weights: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p of each target, float32 [B, T]; inputs and targets [B, T] int32."""
    logits = nnx.merge(graph, weights)(inputs)
    right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right
