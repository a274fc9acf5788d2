"""Print several texts to stdout while they grow, in order."""

from collections.abc import Sequence

from dantinox.inference.detokenizer import IncrementalDetokenizer


class StreamPrinter:
    """Prints texts that grow together in order: the first one as it arrives, the next once the first is done.

    Attributes:
        current: index of the text that is being printed.
    """

    def __init__(self, texts: Sequence[IncrementalDetokenizer], stream: bool) -> None:
        self.texts, self.stream, self.current = texts, stream, 0

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return all(text.done for text in self.texts)

    def add(self, ids: Sequence[Sequence[int]], done: Sequence[bool]) -> None:
        """Decode more ids of each text, and print them if streaming."""
        for text, new_ids, is_last in zip(self.texts, ids, done, strict=True):
            text.add(new_ids, is_last)
        if self.stream:
            self._print_ready()

    def finish(self) -> None:
        """End all texts and print what remains."""
        for text in self.texts:
            text.add([], done=True)
        self._print_ready()

    def _print_ready(self) -> None:
        while self.current < len(self.texts):
            text = self.texts[self.current]
            print(text.pop_ready(), end="", flush=True)
            if not text.done:
                return
            self.current += 1


def prompt_headers(prompts: Sequence[str], num_samples: int) -> list[str]:
    """Return what is printed before each text: its prompt, below a numbered line if there are several texts."""
    headers = []
    for i, prompt in enumerate(prompts):
        for sample in range(num_samples):
            numbers = [f"prompt {i + 1} of {len(prompts)}"] if len(prompts) > 1 else []
            numbers += [f"sample {sample + 1} of {num_samples}"] if num_samples > 1 else []
            headers.append((f"--- {', '.join(numbers)} ---\n" if numbers else "") + prompt)
    return headers
