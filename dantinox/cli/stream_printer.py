"""Prints several texts to stdout while they grow, one after the other."""

from collections.abc import Sequence

from dantinox.inference.detokenizer import Text


class Screen:
    """Several texts that grow together; stdout shows one after the other, each as soon as its turn has come."""

    def __init__(self, texts: Sequence[Text], stream: bool) -> None:
        self.texts, self.stream, self.turn = texts, stream, 0

    @property
    def done(self) -> bool:
        return all(text.done for text in self.texts)

    def add(self, ids: Sequence[Sequence[int]], done: Sequence[bool]) -> None:
        """More ids of each text; shown at once when streaming."""
        for text, new, last in zip(self.texts, ids, done, strict=True):
            text.add(new, last)
        if self.stream:
            self._show()

    def end(self) -> None:
        """Nothing more comes: show all there is."""
        for text in self.texts:
            text.add([], done=True)
        self._show()

    def _show(self) -> None:
        while self.turn < len(self.texts):
            text = self.texts[self.turn]
            print(text.take(), end="", flush=True)
            if not text.done:
                return
            self.turn += 1


def heads(prompts: Sequence[str], samples: int) -> list[str]:
    """What stands before each text: a line that numbers it where there are several, and its prompt."""
    out = []
    for i, prompt in enumerate(prompts):
        for sample in range(samples):
            numbers = [f"prompt {i + 1} of {len(prompts)}"] if len(prompts) > 1 else []
            numbers += [f"sample {sample + 1} of {samples}"] if samples > 1 else []
            out.append((f"--- {', '.join(numbers)} ---\n" if numbers else "") + prompt)
    return out
