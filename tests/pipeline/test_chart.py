"""A curve in characters falls where the numbers fall."""

from pipeline.chart import draw_curve


def test_a_falling_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = draw_curve([(step, 10.0 - step) for step in range(1, 9)], width=8, height=8)
    body = [line.partition("|")[2] for line in lines[:-1]]
    assert [row.index("*") for row in body] == list(range(8))
    assert [row.count("*") for row in body] == [1] * 8


def test_the_axes_say_what_is_largest_smallest_first_and_last() -> None:
    lines = draw_curve([(1, 2.5), (50, 0.125), (100, 1.0)])
    assert lines[0].startswith("  2.5 |")
    assert lines[-2].startswith("0.125 |")
    assert lines[-1].split() == ["+1", "100"]


def test_many_points_share_columns_by_their_mean() -> None:
    lines = draw_curve([(step, float(step % 2)) for step in range(100)], width=10)
    assert {line.partition(" |")[0].strip() for line in lines[:-1]} == {"0.5", ""}


def test_a_constant_is_a_line_and_one_point_is_no_curve() -> None:
    lines = draw_curve([(1, 3.0), (2, 3.0)])
    assert sum("*" in line for line in lines) == 1
    assert draw_curve([(1, 3.0)]) == []
    assert all(line.isascii() for line in lines)
