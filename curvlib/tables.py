"""Short tables of text, for what is printed."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 12  # rows that are shown


def aligned(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows of cells in columns.

    Example:
        >>> print(aligned([("block", "bytes"), ("weight", "8")]))
        block   bytes
        weight  8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, limit: int = LIMIT) -> str:
    """A title and a table of at most ``limit`` rows, and how many more there are.

    Example:
        >>> print(table("two", ("name",), [("a",), ("b",)], limit=1))
        two
          name
          a
          ... 1 more
    """
    shown = rows if len(rows) <= limit else rows[:limit]
    lines = [title, aligned([header, *shown], indent="  ")]
    return "\n".join(lines if len(shown) == len(rows) else [*lines, f"  ... {len(rows) - len(shown)} more"])


def amount(number: int) -> str:
    """A number of bytes, readable.

    Example:
        >>> amount(512), amount(1_234_567)
        ('512 B', '1.23 MB')
    """
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
