"""How figures are shown to people."""

from collections.abc import Mapping

_SHARES = frozenset({"relative_gap", "relative_gap_spread", "largest_gap"})
"""So small and so alike that people compare them in percent."""


def show_figures(figures: Mapping[str, float]) -> str:
    """Figures in one line: `loss 1.234, tokens per second 3,900`, `relative gap 0.083 %`."""
    return ", ".join(f"{spoken(name)} {show_figure(name, v)}" for name, v in figures.items())


def spoken(name: str) -> str:
    """A figure's name as people read it."""
    return name.replace("_", " ")


def show_figure(name: str, value: float) -> str:
    """A value in the unit in which people compare the figure of this name."""
    return f"{100 * value:.3f} %" if name in _SHARES else show_number(value)


def show_number(value: float) -> str:
    """Four significant digits; large numbers whole, with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
