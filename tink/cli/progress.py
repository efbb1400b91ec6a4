"""How far a command has come."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn


def bar(time: ProgressColumn) -> Progress:
    """On a terminal alone, and beside what is printed. `time`: what it says of time."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
