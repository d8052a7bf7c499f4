"""The one exception that users are meant to read."""

from __future__ import annotations


class BenchError(Exception):
    """Bad input or a bad surrounding: one line that says what was wrong and what to do.

    Notebooks show the line alone, the command line prints it and exits with 1. Anything that is not a
    `BenchError` is a bug of ours and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        # IPython asks the exception itself how to render; a traceback would bury the one line that helps.
        return [f"Error: {self}"]
