"""How figures are shown to people."""

from collections.abc import Mapping

_SHARES = frozenset({"relative_gap", "relative_gap_spread", "largest_gap"})
"""So small and so alike that people compare them in percent."""
_MFU = "mfu"
"""Model FLOPs utilisation, which people write in capitals and in percent."""


def show_figures(figures: Mapping[str, float]) -> str:
    """Figures in one line: `loss 1.234, tokens per second 3,900`, `relative gap 0.083 %`."""
    return ", ".join(f"{spoken(name)} {show_figure(name, v)}" for name, v in figures.items())


def spoken(name: str) -> str:
    """A figure's name as people read it."""
    return name.upper() if name == _MFU else name.replace("_", " ")


def show_figure(name: str, value: float) -> str:
    """A value in the unit in which people compare the figure of this name."""
    if name == _MFU:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.3f} %" if name in _SHARES else show_number(value)


def show_number(value: float) -> str:
    """Four significant digits; large numbers whole, with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def show_bytes(count: int) -> str:
    """A size in the unit in which people say it: `2.8 MB`."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def show_seconds(seconds: float) -> str:
    """A duration: seconds below a minute, else a clock: `49.6 s`, `10:30`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    clock = f"{rest // 60:02}:{rest % 60:02}"
    return f"{hours}:{clock}" if hours else clock


def shortened(error: str, most: int = 80) -> str:
    """The beginning of an error, in one line."""
    line = " ".join(error.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
