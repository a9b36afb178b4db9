"""How sure an accuracy is."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""The normal distribution's 97.5% quantile."""


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a share.

    Unlike the plain normal interval it stays inside [0, 1], and 20 right of 20 does not mean certainty.

    Args:
        successes: How many were right; may be fractional when a sample's score is a share.
        trials: Out of how many, at least 1.
        z: The normal quantile of the confidence wanted, 95% by default.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: if `trials` is not positive or `successes` is not between 0 and `trials`.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"got {successes} successes of {trials} trials; needed are 0 <= successes <= trials, trials > 0"
        )
    share = successes / trials
    scale = 1 + z * z / trials
    center = (share + z * z / (2 * trials)) / scale
    margin = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At the ends the bound is exact, whatever rounding makes of it.
    low = 0.0 if successes == 0 else max(0.0, center - margin)
    high = 1.0 if successes == trials else min(1.0, center + margin)
    return low, high
