"""Fits without negative coefficients."""

from hypothesis import given
from hypothesis import strategies as st

from app.least_squares import fit_non_negative


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1000), st.floats(0.001, 100)), min_size=1, max_size=20))
def test_least_squares_find_no_negative_coefficient_and_no_worse_fit_than_each_column_alone(
    samples: list[tuple[float, float, float]],
) -> None:
    rows = [[1.0, a, b] for a, b, _ in samples]
    values = [value for *_, value in samples]

    def error(coefficients: list[float]) -> float:
        fitted = [sum(c * x for c, x in zip(coefficients, row, strict=True)) for row in rows]
        return sum((f / v - 1) ** 2 for f, v in zip(fitted, values, strict=True))

    found = fit_non_negative(rows, values)
    assert min(found) >= 0
    mean = sum(1 / v for v in values) / sum(1 / v**2 for v in values)
    assert error(found) <= error([mean, 0.0, 0.0]) * (1 + 1e-3) + 1e-6
