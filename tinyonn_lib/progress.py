"""How long work says where it is, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""`(done, total, note)`: both in one unit, samples or steps; the note may be empty. `workbench.progress` shows it."""
