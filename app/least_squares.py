"""Non-negative least squares of relative errors, for times that are fitted to a handful of coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def fit_non_negative(
    rows: Sequence[Sequence[float]], values: Sequence[float], weights: Sequence[float] | None = None
) -> list[float]:
    """Fit coefficients [k], none below 0, with which `rows` [n, k] give `values` [n] (all above 0); 4 digits each.

    The squares of the relative errors are minimized, each error times its weight [n]: a millisecond matters in a short
    prompt's time and not in a long one's.  The optimum is the unconstrained one over some subset of the columns.  With
    up to five columns all 31 subsets are soon tried (0.3 ms), on the normal equations with columns scaled to length 1.
    """
    import numpy as np  # here, as it would add a second to the start of a sim engine

    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    matrix = np.asarray(rows, dtype=float) * (weight / np.asarray(values, dtype=float))[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    used = [column for column in range(matrix.shape[1]) if scale[column] > 0]
    matrix = matrix[:, used] / scale[used]
    gram, moment, total = matrix.T @ matrix, matrix.T @ weight, float(weight @ weight)
    best, smallest = [0.0] * len(scale), float("inf")
    for size in range(1, len(used) + 1):
        for subset in combinations(range(len(used)), size):
            columns = list(subset)
            solution = _solve(gram[np.ix_(columns, columns)], moment[columns])
            if (solution < 0).any():
                continue
            error = total - float(moment[columns] @ solution)
            if error < smallest * (1 - 1e-9):
                smallest = error
                best = [0.0] * len(scale)
                for column, coefficient in zip(columns, solution, strict=True):
                    best[used[column]] = float(f"{coefficient / scale[used[column]]:.4g}")
    return best


def _solve(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    import numpy as np

    try:
        return np.linalg.solve(gram, moment)
    except np.linalg.LinAlgError:  # the columns depend on each other: a smaller subset does as well
        return np.full(len(moment), -1.0)
