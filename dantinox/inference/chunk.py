"""What decoding yields: the new ids of some steps."""

from typing import NamedTuple

DONE_TOKEN = -1  # in place of a token id that does not exist, such as after the end of a sequence


class Chunk(NamedTuple):
    """New ids of all sequences.

    Attributes:
        ids: new ids per sequence, all samples of the first prompt first.
        done: whether each sequence has ended.
        steps: steps of the model that each sequence took.
    """

    ids: list[list[int]]
    done: list[bool]
    steps: list[int]
