"""Composed odd polynomials of degree 5 that send an interval [lower, 1] as near to 1 as possible.

The best one of n polynomials composed is the best one on the interval that the others leave. On long intervals it sends
even large values near 0, where rounding of products of size 1 is not small any more, and not safely positive: so low
ends are raised to a 40th of the high one, which costs 2 percent of the growth of small values.

Sources: Grishina, Smirnov and Rakhuba 2025, arXiv 2506.10935 (CANS: Newton-Schulz with Chebyshev-optimal polynomials);
Amsel et al. 2025, arXiv 2505.16932 (that composing the best ones is optimal).
"""

from __future__ import annotations

import functools
import math

from curvlib.linalg.eager import constant_when_compiled

LIMIT = (1.875, -1.25, 0.375)  # of an interval that shrinks to 1: of third order there
CUSHION = 0.025  # the least ratio of an interval's ends: the best polynomials of longer ones amplify rounding
SMALLEST = 1e-4  # relative length of an interval from which on the limit is used: its error is below rounding

Quintic = tuple[float, float, float]


def margin(eps: float) -> float:
    """By which factor products that round by ``eps`` may move a singular value out of its interval.

    Outside, polynomials are steep: a singular value that is not expected there runs away.
    """
    return 1 + 4 * eps


@functools.cache
def composed(lower: float, margin: float, count: int | None) -> tuple[Quintic, ...]:
    """The coefficients (a, b, c) of the polynomials x (a + b x^2 + c x^4).

    Args:
        lower: the smallest singular value that matters.
        margin: by which factor intervals are widened.
        count: how many; None: until the interval is as short as the margin lets it be.

    Example:
        >>> x = 0.001
        >>> for a, b, c in quintics(0.001, 1 + 1e-12, None):
        ...     x = x * (a + b * x**2 + c * x**4)
        >>> abs(x - 1) < 1e-12
        True
    """
    found: list[Quintic] = []
    low, high = lower / margin, margin
    while high - low > 4 * (margin - 1) if count is None else len(found) < count:
        (a, b, c), error = best_quintic(max(low, CUSHION * high), high)
        found.append((a, b, c))
        low = min(low * (a + b * low**2 + c * low**4), 1 - error)
        low, high = low / margin, (1 + error) * margin
    return tuple(found)


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd polynomial p(x) = x g(x^2) of degree 5 nearest to 1 on [low, high], and its largest error.

    Remez: the error has alternating signs at low, two inner points and high. As g is quadratic, its third divided
    difference over their squares is zero, which gives the error. The extrema of p are the next inner points.
    """
    if high - low < SMALLEST * high:
        return LIMIT, (high - low) ** 3
    inner = [low + (high - low) / 4, low + 3 * (high - low) / 4]
    signs = [1, -1, 1, -1]
    error, previous = math.inf, 0.0
    for _ in range(50):
        points = [low, *inner, high]
        squares = [x * x for x in points]
        weights = [1 / (x * math.prod(y - z for z in squares if z != y)) for x, y in zip(points, squares, strict=True)]
        previous, error = error, sum(weights) / sum(w * s for w, s in zip(weights, signs, strict=True))
        if abs(previous - error) <= 1e-14:
            break
        values = [(1 - s * error) / x for s, x in zip(signs, points, strict=True)]
        a, b, c = through(squares[:3], values[:3])
        root = math.sqrt(9 * b * b - 20 * a * c)  # p'(x) = a + 3 b x^2 + 5 c x^4
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return (a, b, c), error


def through(places: list[float], values: list[float]) -> Quintic:
    """The coefficients of the quadratic a + b y + c y^2 with given values at three places."""
    first = (values[1] - values[0]) / (places[1] - places[0])
    second = (values[2] - values[1]) / (places[2] - places[1])
    c = (second - first) / (places[2] - places[0])
    b = first - c * (places[0] + places[1])
    return values[0] - places[0] * (b + c * places[0]), b, c


@constant_when_compiled
def quintics(lower: float, margin: float, count: int | None) -> tuple[Quintic, ...]:
    """`composed` without its memory in sight, which a compiler would look through."""
    return composed(lower, margin, count)
