"""Texts in, texts out: `dantinox.complete`, for whom token ids are a detail."""

from collections.abc import Sequence

from dantinox.config.validation import check_int
from dantinox.data.tokenizer import Tokenizer
from dantinox.inference import generate
from dantinox.inference.detokenizer import Text
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
    prefill_chunk: int = generate.PREFILL_CHUNK,
) -> list[str]:
    """Continue each text.

    Args:
        prompts: texts; an empty one starts a document.
        max_new_tokens: most tokens a text gets; the end of the document ends it earlier.
        stop: texts of which the first to be complete ends a text; it is not returned.
        n: samples a prompt.

    The other arguments are those of `dantinox.generate`.

    Returns:
        len(prompts) * n continuations without their prompts, all samples of the first prompt first. A character that
        is not whole at the end is a replacement character.

    Raises:
        ValueError: an argument is not allowed, or prompt and new tokens do not fit in max_context.
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is {texts!r:.60}; allowed: a list of texts")
    if "" in stop:
        raise ValueError("stop holds an empty text; allowed: text")
    request = generate.Request(
        prompts=[tokenizer.encode(prompt) if prompt else [tokenizer.eos_id] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=Sampling.checked(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop_tokens=(tokenizer.eos_id,),
        samples=range(check_int("n", n, 1)),
        prefill_chunk=prefill_chunk,
    )
    texts = [Text(tokenizer, "", stop) for _ in range(len(prompts) * n)]
    for chunk in generate.run(model, request):
        for text, ids, done in zip(texts, *chunk, strict=True):
            text.add(ids, done)
        if all(text.done for text in texts):
            break
    for text in texts:
        text.add([], done=True)
    return [text.take().removesuffix("\n") for text in texts]
