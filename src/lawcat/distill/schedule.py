"""Learning rate as a function of the step alone, so that a resumed run needs no schedule's state."""

from __future__ import annotations

import math

from lawcat.distill.recipe import StageSettings


def learning_rate_factor(step: int, settings: StageSettings) -> float:
    """Return the learning rate of a step, counted from 0, over its peak.

    >>> from lawcat.distill.recipe import AttentionTransferSettings
    >>> settings = AttentionTransferSettings(steps=10, warmup_steps=2, min_learning_rate_ratio=0.1)
    >>> [round(learning_rate_factor(step, settings), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.13]
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    low = settings.min_learning_rate_ratio
    if settings.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "trapezoid":
        progress = max(0.0, progress - (1 - settings.decay_share)) / settings.decay_share
    return low + (1 - low) * (1 - progress)
