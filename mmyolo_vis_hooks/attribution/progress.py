"""A progress bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, show: bool, total: int | None = None
) -> Iterator[Item]:
    """Give the items; show a bar on a terminal that vanishes at the end.

    Args:
        items (Iterable): What is worked on.
        description (str): Stands before the bar.
        show (bool): False shows nothing.
        total (int, optional): Number of items, where they have no length.
    """
    yield from rich_track(
        items, description, total=total, transient=True, disable=not show
    )
