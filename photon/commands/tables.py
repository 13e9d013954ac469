"""Tables that are printed whole, however narrow the terminal is."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ANY = 10_000


def print_whole(console: Console, table: Table) -> None:
    """Print a table whose names and keys people copy: a narrow terminal wraps its lines, and cuts nothing."""
    width = console.width
    needed = Measurement.get(console, console.options.update(max_width=_ANY), table).maximum
    console.width = max(width, needed)
    console.print(table)
    console.width = width
