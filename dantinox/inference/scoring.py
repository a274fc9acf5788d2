"""Score a text with a model: loss, perplexity, bits per byte.

Every token of every document is scored once, given an end of document and the tokens before it in its window:

    document      0 a b c d e f g h i        0 = end of document, not scored itself
    window 1      . * * * * *                context 5, stride 2: . = context only, * = scored
    window 2          . . . . * *            each token has at least context - stride tokens of context,
    window 3              . . . . * *        except at the start of its document
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dantinox.config.validation import check_int
from dantinox.data.corpus import Document
from dantinox.data.tokenizer import Tokenizer
from dantinox.distributed.inference import kernels_on, mesh_of
from dantinox.inference import generate
from dantinox.model.transformer import Transformer


class Score(NamedTuple):
    """Score of a text.

    Attributes:
        documents, tokens, bytes: size of the text; bytes of UTF-8.
        nats: -log p of the text.
        context, stride: size and stride of the windows.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); inf if that exceeds the largest float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def score_documents(
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
        model: the model.
        tokenizer: the tokenizer it was trained with.
        documents: the text.
        context: tokens per window; None: max_context of the model.
        stride: tokens between the starts of two windows, 1 to context; None: half of context.
        batch_size: windows per batch; it changes the result by rounding only.

    Raises:
        ValueError: a size is invalid, there is no text, or the tokenizer does not match the model.
    """
    limit = generate.context_limit(model.config)
    context = model.config.max_context if context is None else check_int("context", context, 1)
    if limit is not None and context > limit:
        raise ValueError(
            f"context is {context}; allowed: 1 to max_context {limit} ({generate.why_context_limited(model.config)})"
        )
    stride = max(1, context // 2) if stride is None else check_int("stride", stride, 1, context + 1)
    rows = check_int("batch_size", batch_size, 1)
    start = tokenizer.prefix or (tokenizer.eos_id,)
    texts = [np.append(np.int32(start[-1]), tokenizer.encode(document.text)) for document in documents]
    if sum(len(text) - 1 for text in texts) == 0:
        raise ValueError("there is no text to score")
    # A tokenizer may have more tokens than the model, such as one for images, as long as the text has none of them.
    if max(text.max() for text in texts) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {model.config.vocab_size}"
        )
    # All windows have one width, no larger than the longest text needs, so that only one program is compiled.
    longest = max(len(text) for text in texts) - 1
    width = min(context, 1 << (longest - 1).bit_length())
    graph, weights = nnx.split(model)
    mesh = mesh_of(weights)
    nats, tokens = 0.0, 0
    for batch in batched((pair for text in texts for pair in _scoring_windows(text, context, stride, width)), rows):
        padding = (np.zeros(width, np.int32), np.full(width, _IGNORED_TARGET, np.int32))
        inputs, targets = (np.stack(x) for x in zip(*batch, *[padding] * (rows - len(batch)), strict=True))
        scored = targets != _IGNORED_TARGET
        with kernels_on(mesh):
            losses = _negative_log_probs(graph, weights, inputs, targets)
        nats += np.asarray(losses)[scored].sum(dtype=np.float64)
        tokens += int(scored.sum())
    return Score(len(texts), tokens, sum(document.size for document in documents), float(nats), context, stride)


_IGNORED_TARGET = -1


def _scoring_windows(
    text: np.ndarray, context: int, stride: int, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets), int32 [width], that score each token of text[1:] once."""
    num_scored = 0
    for start in range(0, len(text), stride):
        if num_scored == len(text) - 1:
            return
        end = min(start + context, len(text) - 1)
        inputs, targets = np.zeros(width, np.int32), np.full(width, _IGNORED_TARGET, np.int32)
        inputs[: end - start] = text[start:end]
        targets[num_scored - start : end - start] = text[num_scored + 1 : end + 1]
        num_scored = end
        yield inputs, targets


@functools.partial(jax.jit, static_argnums=0)
def _negative_log_probs(graph: Any, weights: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p of each target, float32 [B, T]; inputs and targets are [B, T] int32."""
    model = nnx.merge(graph, weights)
    return model.token_losses(model.hidden(inputs)[0], targets)
