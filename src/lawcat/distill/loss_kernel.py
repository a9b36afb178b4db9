"""Cross-entropy, KL and their gradient from logits, in one launch that reads each logit twice.

By PyTorch operations the logits of student and teacher, in float32, pass through memory some thirty times; at
vocabularies of 49,152 tokens that takes longer than a small model's own forward and backward.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from lawcat.ops.triton import support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 8192
# A logit of no weight; the difference of two is a number, that of infinities is none.
OUTSIDE = tl.constexpr(-1e30)


@triton.jit
def _loss_kernel(
    student, teacher, targets, weights, kl_factors, losses, vocabulary,
    cross_entropy_weight, kl_weight, temperature,
    HAS_TEACHER: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what ``loss_and_gradient`` returns of a row, and over its logits the gradient. One program a
    row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    student += row * vocabulary
    weight = tl.load(weights + row)
    if weight == 0.0:
        for kind in range(3):
            tl.store(losses + 3 * row + kind, 0.0)
        for start in range(0, vocabulary, BLOCK):
            zeros = tl.zeros([BLOCK], tl.float32)
            tl.store(student + start + column, zeros, mask=start + column < vocabulary)
        return
    target = tl.load(targets + row)
    # Before the sums, at which threads wait for each other: afterwards another may have written over it.
    wanted = tl.load(student + target).to(tl.float32)

    # Sums of exponentials below the largest logit so far.
    largest = OUTSIDE
    total = 0.0
    tempered_total = 0.0
    teacher_largest = OUTSIDE
    teacher_total = 0.0
    difference = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        s = tl.load(student + start + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(inside, s, OUTSIDE)
        new = tl.maximum(largest, tl.max(s, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(s - new), axis=0)
        if HAS_TEACHER:
            tempered_total = tempered_total * tl.exp((largest - new) / temperature)
            tempered_total += tl.sum(tl.exp((s - new) / temperature), axis=0)
            t = tl.load(teacher + row * vocabulary + start + column, mask=inside, other=0.0).to(tl.float32)
            t = tl.where(inside, t, OUTSIDE)
            teacher_new = tl.maximum(teacher_largest, tl.max(t, axis=0))
            shrinks = tl.exp((teacher_largest - teacher_new) / temperature)
            p = tl.exp((t - teacher_new) / temperature)
            teacher_total = teacher_total * shrinks + tl.sum(p, axis=0)
            difference = difference * shrinks + tl.sum(p * (t - s), axis=0)
            teacher_largest = teacher_new
        largest = new

    # Without the largest logits, next to which they would lose digits.
    log_total = tl.log(total)
    tl.store(losses + 3 * row, weight * (largest - wanted + log_total))
    tl.store(losses + 3 * row + 2, (wanted >= largest).to(tl.float32))
    log_tempered = 0.0
    log_teacher = 0.0
    kl = 0.0
    kl_factor = 1.0
    if HAS_FACTORS:
        kl_factor = tl.load(kl_factors + row)
    if HAS_TEACHER:
        log_tempered = tl.log(tempered_total)
        log_teacher = tl.log(teacher_total)
        kl = (difference / teacher_total - (teacher_largest - largest)) / temperature
        kl += log_tempered - log_teacher
    tl.store(losses + 3 * row + 1, weight * kl_factor * kl * temperature * temperature)

    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        s = tl.load(student + start + column, mask=inside, other=0.0).to(tl.float32)
        is_target = (start + column == target).to(tl.float32)
        gradient = cross_entropy_weight * (tl.exp(s - largest - log_total) - is_target)
        if HAS_TEACHER:
            t = tl.load(teacher + row * vocabulary + start + column, mask=inside, other=0.0).to(tl.float32)
            p = tl.exp((t - teacher_largest) / temperature - log_teacher)
            tempered = tl.exp((s - largest) / temperature - log_tempered)
            gradient += kl_weight * kl_factor * temperature * (tempered - p)
        tl.store(student + start + column, weight * gradient, mask=inside)


def is_usable(hidden: Tensor) -> bool:
    """Return whether the kernel can take the logits of these hidden states."""
    if hidden.dtype not in _DTYPES:
        return False
    if support.is_interpreted():
        return True
    return hidden.device.type == "cuda" and support.too_old(hidden.device) is None


def loss_and_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    kl_factors: Tensor | None = None,
    *,
    cross_entropy_weight: float,
    kl_weight: float,
    temperature: float,
) -> Tensor:
    """Return each token's cross-entropy, KL and whether it is the likeliest [N, 3]; write over the logits.

    Args:
        logits: The student's [N, V], contiguous; afterwards the gradient of the sum over tokens of
            ``cross_entropy_weight * CE + kl_weight * KL``.
        teacher_logits: The same shape, or None for no KL.
        targets: The token that follows each [N].
        weights: Factor of both losses [N], float32; a row of weight 0 is not looked at.
        kl_factors: A further factor of the KL alone [N], float32; None for 1.
        cross_entropy_weight: See above.
        kl_weight: See above.
        temperature: Divides both logits in the KL term, which is multiplied by its square.
    """
    losses = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    if not len(logits):
        return losses
    vocabulary = logits.shape[1]
    is_gpu = logits.device.type == "cuda"
    with torch.cuda.device(logits.device) if is_gpu else contextlib.nullcontext():
        _loss_kernel[(len(logits),)](
            logits, teacher_logits, targets, weights, kl_factors, losses, vocabulary,
            float(cross_entropy_weight), float(kl_weight), float(temperature),
            HAS_TEACHER=teacher_logits is not None,
            HAS_FACTORS=kl_factors is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )  # fmt: skip
    return losses
