"""A curve drawn in characters, for a terminal or a log."""

from collections.abc import Sequence

from pipeline.figures import show_number

_WIDTH, _HEIGHT = 60, 8


def draw_curve(
    points: Sequence[tuple[float, float]], *, width: int = _WIDTH, height: int = _HEIGHT
) -> list[str]:
    """Lines of a chart of (x, y) points, y upwards with its largest and smallest value beside it.

    Each column shows the mean of the points that fall into it. Plain ASCII; nothing for fewer than
    two points.
    """
    if len(points) < 2:
        return []
    columns = _columns(points, width)
    heights = [value for value in columns if value is not None]
    low, high = min(heights), max(heights)
    span = high - low or 1.0
    rows = [[" "] * len(columns) for _ in range(height)]
    for place, value in enumerate(columns):
        if value is not None:
            rows[height - 1 - round((value - low) / span * (height - 1))][place] = "*"
    labels = {0: show_number(high), height - 1: show_number(low)}
    margin = max(map(len, labels.values()))
    lines = [
        f"{labels.get(number, ''):>{margin}} |{''.join(row).rstrip()}"
        for number, row in enumerate(rows)
    ]
    first, last = show_number(points[0][0]), show_number(points[-1][0])
    gap = max(1, len(columns) - len(first) - len(last))
    return [*lines, f"{'':>{margin}} +{first}{' ' * gap}{last}"]


def _columns(points: Sequence[tuple[float, float]], width: int) -> list[float | None]:
    """The mean of the points in each of `width` equal parts of the x axis; none where none is."""
    first, last = points[0][0], points[-1][0]
    found: list[list[float]] = [[] for _ in range(min(width, len(points)))]
    for x, y in points:
        share = (x - first) / (last - first or 1.0)
        found[min(len(found) - 1, int(share * len(found)))].append(y)
    return [sum(some) / len(some) if some else None for some in found]
