"""Autoregressive generation: prefill the prompts, then decode one token per sequence and step in a compiled loop.

Weights, caches, seed and sampling settings are arguments of the compiled programs, and sizes are rounded up
to powers of two, so only the first call of a size compiles. Rows are independent: a prompt gives the same ids
alone and in a batch. A draw depends only on the seed, the sample number 0 .. n - 1 and the step: equal prompts
in one batch give equal texts, and `n` gives different samples.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.config.validation import check_int
from dantinox.distributed.inference import kernels_on, mesh_of
from dantinox.inference import decoding, prefill, speculation
from dantinox.inference.checks import Ids, check_prompts, check_stop_tokens
from dantinox.inference.chunk import DONE_TOKEN, Chunk
from dantinox.inference.sampling import Sampling
from dantinox.kernels import KVCache
from dantinox.model.transformer import Transformer

Array = jax.Array

STREAM_LATENCY_S = 0.05  # seconds per chunk of streamed text
MAX_SPECULATE = 64  # tokens of a draft; longer ones are rarely right


def generate(
    model: Transformer,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_tokens: Iterable[int] = (),
    n: int = 1,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    speculate: int = 0,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: the model.
        prompts: token ids in [0, vocab_size), at least one per prompt; lengths may differ.
        max_new_tokens: maximum number of new tokens per sequence.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draws from the k likeliest tokens; None: from all.
        top_p: draws from the fewest tokens whose probabilities sum to at least top_p; 1: from all.
        min_p: draws from the tokens with at least min_p times the probability of the likeliest; 0: from all.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely.
        seed: seed of all draws, 0 <= seed < 2**32.
        stop_tokens: ids that end a sequence; the stop token itself is not returned.
        n: samples per prompt.
        max_context: maximum number of tokens of a prompt and its continuation together; None: that of the model. It
            applies to models with full attention or learned positions; if every layer has a window, the
            length is unlimited.
        prefill_chunk: tokens per prompt and prefill step; prefill takes the memory of one such chunk. It changes the
            ids by rounding only. None: 2048.
        speculate: tokens that each step drafts from what is repeated in the text, and verifies; 0: none. It changes
            the ids by rounding only, and is fastest for few sequences.

    Returns:
        len(prompts) * n lists of new ids, all samples of the first prompt first.

    Raises:
        ValueError: an argument is invalid, or the prompt and the new tokens do not fit in max_context.
    """
    sampling = Sampling.create(temperature, top_k, top_p, min_p, repetition_penalty)
    samples = range(check_int("n", n, 1))
    request = Request(
        prompts, max_new_tokens, sampling, seed, stop_tokens, samples, max_context, prefill_chunk, speculate
    )
    chunks = [chunk.ids for chunk in generate_chunks(model, request)]
    return [[token for ids in row for token in ids] for row in zip(*chunks, strict=True)]


def stream(
    model: Transformer,
    prompt: Ids,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_tokens: Iterable[int] = (),
    sample: int = 0,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    speculate: int = 0,
) -> Iterator[int]:
    """Yield the new ids of one sequence as they are decoded: `generate(model, [prompt], n=sample + 1, ...)[sample]`.

    Arguments and errors are those of `generate`; they are checked before the first id is decoded.
    """
    sampling = Sampling.create(temperature, top_k, top_p, min_p, repetition_penalty)
    request = Request(
        [prompt], max_new_tokens, sampling, seed, stop_tokens, (sample,), max_context, prefill_chunk, speculate
    )
    return (token for chunk in generate_chunks(model, request, latency=STREAM_LATENCY_S) for token in chunk.ids[0])


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`; `generate_chunks` checks them against a model.

    Attributes:
        samples: the sample numbers of each prompt. The other fields are arguments of `generate`.
    """

    prompts: Sequence[Ids]
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    stop_tokens: Iterable[int] = ()
    samples: Sequence[int] = (0,)
    max_context: int | None = None
    prefill_chunk: int | None = None
    speculate: int = 0


def generate_chunks(model: Transformer, request: Request, latency: float | None = None) -> Iterator[Chunk]:
    """Yield the new ids of every sequence in chunks. Each prompt is prefilled once, for all its samples.

    Args:
        model: the model.
        request: the arguments of `generate`.
        latency: seconds per chunk; None: CHUNK tokens per chunk, which is the fastest. The ids do not depend on it.

    Raises:
        ValueError: as `generate`, before the first chunk.
    """
    config = model.config
    prompts = check_prompts(request.prompts, config.vocab_size)
    count = check_int("max_new_tokens", request.max_new_tokens, 1)
    seed = check_int("seed", request.seed, 0, 2**32)
    samples = [check_int("sample", s, 0, 2**31) for s in request.samples]
    stop_ids = check_stop_tokens(request.stop_tokens, config.vocab_size)
    limit = context_limit(config, request.max_context)
    longest = max(map(len, prompts))
    if limit is not None and longest + count > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {count} make {longest + count}; "
            f"allowed: max_context {limit} ({why_context_limited(config)})"
        )
    drafts = check_int("speculate", request.speculate, 0, MAX_SPECULATE + 1)
    context = prefill.round_up_to_bucket(longest + count, prefill.SMALLEST_CONTEXT, limit)
    slots = prefill.layer_cache_slots(config, context, drafts)
    chunk = decoding.PREFILL_CHUNK
    if request.prefill_chunk is not None:
        chunk = check_int("prefill_chunk", request.prefill_chunk, 1, off="None")
    size = prefill.round_up_to_bucket(longest, prefill.SMALLEST_PROMPT, limit)
    if size > chunk:
        size = -(-longest // chunk) * chunk
    tokens = np.zeros((len(prompts), size), np.int32)
    seen = np.zeros((len(prompts), config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        seen[row, prompt] = True
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    inputs = _Inputs(
        tokens, chunk, lengths, seen, np.uint32(seed), np.array(samples, np.int32), request.sampling, stop_ids
    )
    if drafts:
        return _on_mesh(model, _speculate(model, slots, inputs, drafts, count, latency))
    return _on_mesh(model, _decode_chunks(model, slots, inputs, count, latency))


def _on_mesh(model: Transformer, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks, computed on the mesh that the weights of the model are on."""
    mesh = mesh_of(nnx.state(model))
    while True:
        with kernels_on(mesh):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


class _Inputs(NamedTuple):
    """Validated inputs of a request for B prompts.

    Attributes:
        tokens: token ids of the prompts, [B, T] int32, padded with zeros.
        chunk: tokens per prompt and prefill step.
        lengths: number of tokens per prompt, [B] int32.
        seen: which tokens occur in each prompt, bool [B, V].
        seed: seed of all draws, uint32.
        samples: sample numbers of each prompt, int32.
        sampling: the sampling settings.
        stop_ids: ids that end a sequence, int32.
    """

    tokens: np.ndarray
    chunk: int
    lengths: np.ndarray
    seen: np.ndarray
    seed: np.uint32
    samples: np.ndarray
    sampling: Sampling
    stop_ids: np.ndarray


def _decode_chunks(
    model: Transformer, slots: tuple[int, ...], inputs: _Inputs, count: int, latency: float | None
) -> Iterator[Chunk]:
    """Prefill the prompts, then decode up to `count` tokens per sequence."""
    graph, weights, after_prompts = _prefill(model, slots, inputs)
    start = decoding.start_in_place if len(inputs.samples) == 1 else decoding.start
    state, new = start(graph, weights, *after_prompts, inputs.sampling, inputs.stop_ids)
    ids, size = np.asarray(new)[:, None], decoding.CHUNK if latency is None else 1
    while True:
        running = ids[:, -1] != DONE_TOKEN
        count = count - ids.shape[1] if running.any() else 0
        rows = [row[row != DONE_TOKEN].tolist() for row in ids]
        yield Chunk(rows, (~running | (count == 0)).tolist(), list(map(len, rows)))
        if not count:
            return
        size, chunk_start = min(size, count), time.perf_counter()
        state, new = decoding.decode_chunk(graph, weights, state, inputs.sampling, inputs.stop_ids, np.int32(size))
        ids = np.asarray(new)[:, :size]
        if latency is not None:
            size = max(1, min(decoding.CHUNK, int(size * latency / (time.perf_counter() - chunk_start))))


def _speculate(
    model: Transformer,
    slots: tuple[int, ...],
    inputs: _Inputs,
    drafts: int,
    count: int,
    latency: float | None,
) -> Iterator[Chunk]:
    """Prefill the prompts, then decode up to `count` tokens per sequence with drafts."""
    graph, weights, after_prompts = _prefill(model, slots, inputs)
    repeat = decoding.repeat_prompts_in_place if len(inputs.samples) == 1 else decoding.repeat_prompts
    first = repeat(graph, weights, *after_prompts)
    longest = int(inputs.lengths.max())
    size = prefill.round_up_to_bucket(longest + count + 1 + drafts, prefill.SMALLEST_CONTEXT)
    start = speculation.initial_state(
        first.caches,
        first.logits,
        first.keys,
        first.seen,
        inputs.tokens[:, :longest],
        inputs.lengths,
        inputs.samples.size,
        size,
    )
    return speculation.decode(
        (graph, weights), start, inputs.sampling, inputs.stop_ids, num_drafts=drafts, count=count, latency=latency
    )


def _prefill(
    model: Transformer, slots: tuple[int, ...], inputs: _Inputs
) -> tuple[Any, Any, tuple[Array, np.uint32, np.ndarray, list[KVCache], np.ndarray]]:
    """Prefill the prompts -> (graph, weights, (last, seed, samples, caches, seen)), the last for `decoding.start`."""
    graph, weights = nnx.split(model)
    weights = decoding.cast_weights(weights, model.config.dtype)
    prefilled: prefill.PrefillState | None = None
    for start in range(0, inputs.tokens.shape[1], inputs.chunk):
        tokens = inputs.tokens[:, start : start + inputs.chunk]
        # Rounded up to a power of two too; positions before the prompt are masked.
        past = prefill.round_up_to_bucket(start, 1) if start else 0
        prefilled = decoding.prefill_chunk(
            graph, slots, past, weights, tokens, np.int32(start), inputs.lengths, prefilled
        )
    assert prefilled is not None, "a prompt has at least one chunk"
    return graph, weights, (prefilled.last, inputs.seed, inputs.samples, prefilled.caches, inputs.seen)


def context_limit(config: ModelConfig, max_context: int | None = None) -> int | None:
    """Return the maximum length of a sequence in tokens, prompt included; None if it is unlimited."""
    if max_context is not None:
        max_context = check_int("max_context", max_context, 1)
        if config.pos_encoding == "learned" and max_context > config.max_context:
            raise ValueError(f"max_context is {max_context}; allowed: up to {config.max_context}")
    return None if why_context_limited(config) is None else max_context or config.max_context


def why_context_limited(config: ModelConfig) -> str | None:
    """Return why the length of a sequence is limited; None if every layer has a window."""
    if config.pos_encoding == "learned":
        return "the model has learned positions"
    full = [layer for layer in range(config.n_layers) if config.layer_window(layer) is None]
    if not full:
        return None
    return "every layer has full attention" if len(full) == config.n_layers else f"layer {full[0]} has full attention"
