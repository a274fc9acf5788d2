"""Continue texts without handling token ids: `dantinox.complete`."""

from collections.abc import Sequence

from dantinox.config.validation import check_int
from dantinox.data.tokenizer_protocol import Tokenizer, prompt_ids
from dantinox.inference import generate
from dantinox.inference.detokenizer import IncrementalDetokenizer
from dantinox.inference.sampling import Sampling
from dantinox.model.transformer import Transformer


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int = 1,
    prefill_chunk: int | None = None,
) -> list[str]:
    """Continue each text.

    Args:
        model: the model.
        tokenizer: the tokenizer it was trained with.
        prompts: texts to continue; an empty one starts a document.
        max_new_tokens: maximum number of new tokens per text; the end of the document ends it earlier.
        stop: strings; the first of them to be complete ends a text and is not returned.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draws from the k likeliest tokens; None: from all.
        top_p: draws from the fewest tokens whose probabilities sum to at least top_p; 1: from all.
        min_p: draws from the tokens with at least min_p times the probability of the likeliest; 0: from all.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely.
        seed: seed of all draws, 0 <= seed < 2**32.
        n: samples per prompt.
        prefill_chunk: tokens per prompt and prefill step; prefill takes the memory of one such chunk. None: 2048.

    Returns:
        len(prompts) * n continuations without their prompts, all samples of the first prompt first. An incomplete
        character at the end becomes a replacement character.

    Raises:
        ValueError: an argument is invalid, or the prompt and the new tokens do not fit in max_context.
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is {texts!r:.60}; allowed: a list of texts")
        if invalid := [text for text in texts if text.encode(errors="replace").decode() != text]:
            raise ValueError(
                f"{name} contains {invalid[0]!r:.60}, which has a surrogate; allowed: texts that UTF-8 encodes"
            )
    if "" in stop:
        raise ValueError("stop contains ''; allowed: texts that are not empty")
    request = generate.Request(
        prompts=[prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=Sampling.create(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop_tokens=tokenizer.stop_ids,
        samples=range(check_int("n", n, 1)),
        prefill_chunk=prefill_chunk,
    )
    texts = [IncrementalDetokenizer(tokenizer, "", stop) for _ in range(len(prompts) * n)]
    for chunk in generate.generate_chunks(model, request):
        for text, ids, done in zip(texts, chunk.ids, chunk.done, strict=True):
            text.add(ids, done)
        if all(text.done for text in texts):
            break
    for text in texts:
        text.add([], done=True)
    return [text.pop_ready().removesuffix("\n") for text in texts]
