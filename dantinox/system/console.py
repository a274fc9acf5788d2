"""Rich's console, for output whose reader may go away."""

from typing import Any, NoReturn

import rich.console


class Console(rich.console.Console):
    """A console that raises BrokenPipeError when its reader is gone; Rich's own ends the program with exit code 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error that is being handled: Rich calls this in its except clause."""
        raise

    @property
    def can_update(self) -> bool:
        """Whether lines that were printed can be replaced."""
        return self.is_terminal and not self.is_dumb_terminal


def plain_console(**options: Any) -> Console:
    """Return a console that prints lines as they are: not highlighted, not wrapped."""
    return Console(highlight=False, soft_wrap=True, **options)
