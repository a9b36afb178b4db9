"""The losses of the stages.

Legend: B sequences, T tokens, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lawcat.ops import choose_backend
from lawcat.ops.triton import support

# Logits of so many tokens at a time: 1,024 x 49,152 float32 numbers are 200 MB. A CPU gets fewer: memory
# for larger tensors is fetched from the system, and zeroed page by page, anew each time.
_TOKENS_AT_A_TIME = 1024
_TOKENS_AT_A_TIME_ON_CPU = 64


def relative_squared_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return, a sequence, the mean squared error over the target's mean square.

    Dividing makes layers count alike and the number readable: 1 is what an output of zeros would score. It is
    done per sequence and not per batch, so that the mean over a batch does not depend on how the batch was
    split over processes.

    Args:
        output: [B, T, H, D].
        target: The same shape.
        weight: What each token counts in both means [B, T], 0 or more; None for all alike.

    Returns:
        [B], float32; 0 for a sequence without weight.
    """
    output, target = output.float(), target.float()
    error, size = (x.pow(2).mean((-1, -2)) for x in (output - target, target))  # [B, T]
    if weight is None:
        return error.mean(-1) / size.mean(-1)
    tiny = torch.finfo(torch.float32).tiny
    return (weight * error).sum(-1) / (weight * size).sum(-1).clamp(min=tiny)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(teacher || student) of next-token distributions, a token, in nats.

    Args:
        student_logits: [..., V], float32.
        teacher_logits: The same shape.

    Returns:
        [...].

    Example:
        >>> round(kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 99.0]])).item(), 4)
        0.6931
    """
    student_log, teacher_log = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    return F.kl_div(student_log, teacher_log, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def hidden_divergence(hidden: Tensor, teacher_hidden: Tensor, head: Tensor) -> Tensor:
    """Return ``kl_divergence`` from last hidden states, a piece of the tokens at a time, without gradient.

    Args:
        hidden: The student's [..., hidden].
        teacher_hidden: The teacher's, the same shape.
        head: The output matrix of both [V, hidden].

    Returns:
        [...], float32.
    """
    rows, teacher_rows = hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    step = _tokens_at_a_time(hidden)
    pieces = [
        kl_divergence(F.linear(mine, head).float(), F.linear(theirs, head).float())
        for mine, theirs in zip(torch.split(rows, step), torch.split(teacher_rows, step), strict=True)
    ]
    return torch.cat(pieces).view(hidden.shape[:-1])


def _tokens_at_a_time(hidden: Tensor) -> int:
    return _TOKENS_AT_A_TIME_ON_CPU if hidden.device.type == "cpu" else _TOKENS_AT_A_TIME


def _fused_losses(hidden: Tensor) -> Callable[..., Tensor] | None:
    """Return the kernel where it can run."""
    if choose_backend("auto", hidden.device.type) != "triton" or support.missing() is not None:
        return None
    from lawcat.distill import loss_kernel

    return loss_kernel.loss_and_gradient if loss_kernel.is_usable(hidden) else None


class LanguageLosses(NamedTuple):
    """Sums over tokens, each times its weight.

    Args:
        loss: What is minimized.
        cross_entropy: Its first part, without gradient.
        kl: Its second part, without gradient.
        right: The weight of those tokens of answers that are the student's likeliest.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    right: Tensor

    def divided_by(self, total_weight: Tensor | float) -> LanguageLosses:
        """Return means; ``right`` stays a sum, since not all tokens are answers."""
        loss, cross_entropy, kl = (value / total_weight for value in self[:3])
        return LanguageLosses(loss, cross_entropy, kl, self.right)


class _LanguageLoss(torch.autograd.Function):
    """Cross-entropy and KL over a vocabulary, a piece of the tokens at a time, gradients computed on the way.

    Holding the logits of a whole batch, twice for student and teacher and again for their gradients, is what
    runs a GPU out of memory in distillation. Here each piece's gradient with respect to the hidden states is
    taken at once and its logits are forgotten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        kl_factors: Tensor | None,
        answer_weights: Tensor | None,
        cross_entropy_weight: float,
        kl_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        hidden_grad = torch.zeros_like(hidden)
        head_grad = torch.zeros_like(head) if head.requires_grad else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        step = _tokens_at_a_time(hidden)
        fused = _fused_losses(hidden)
        for start in range(0, hidden.shape[0], step):
            piece = slice(start, start + step)
            weight = weights[piece]
            kl_factor = None if kl_factors is None else kl_factors[piece]
            answer_weight = None if answer_weights is None else answer_weights[piece]
            if fused is not None:
                logits = F.linear(hidden[piece], head)
                teacher_logits = None
                if kl_weight and teacher_hidden is not None and teacher_head is not None:
                    teacher_logits = F.linear(teacher_hidden[piece], teacher_head).to(logits.dtype)
                values = fused(
                    logits,
                    teacher_logits,
                    targets[piece],
                    weight,
                    kl_factor,
                    cross_entropy_weight=cross_entropy_weight,
                    kl_weight=kl_weight,
                    temperature=temperature,
                )
                sums[:2] += values[:, :2].sum(0)
                if answer_weight is not None:
                    sums[2] += (answer_weight * values[:, 2]).sum()
                hidden_grad[piece] = logits @ head
                if head_grad is not None:
                    head_grad += logits.T @ hidden[piece]
                continue
            with torch.enable_grad():
                piece_hidden = hidden[piece].detach().requires_grad_()
                piece_head = head.detach().requires_grad_(head.requires_grad)
                logits = F.linear(piece_hidden, piece_head).float()
                cross_entropy = (weight * F.cross_entropy(logits, targets[piece], reduction="none")).sum()
                total = cross_entropy_weight * cross_entropy
                kl = torch.zeros((), device=hidden.device)
                if kl_weight and teacher_hidden is not None and teacher_head is not None:
                    with torch.no_grad():
                        teacher_logits = F.linear(teacher_hidden[piece], teacher_head).float()
                    divergence = kl_divergence(logits / temperature, teacher_logits / temperature)
                    kl_weights = weight if kl_factor is None else weight * kl_factor
                    kl = (kl_weights * divergence).sum() * temperature**2
                    total = total + kl_weight * kl
                wanted = [piece_hidden, piece_head] if head_grad is not None else [piece_hidden]
                grads = torch.autograd.grad(total, wanted)
            hidden_grad[piece] = grads[0]
            if head_grad is not None:
                head_grad += grads[1]
            sums[:2] += torch.stack([cross_entropy.detach(), kl.detach()])
            if answer_weight is not None:
                wanted_logits = logits.detach().gather(-1, targets[piece, None]).squeeze(-1)
                sums[2] += (answer_weight * (wanted_logits >= logits.detach().amax(-1))).sum()
        ctx.save_for_backward(hidden_grad, head_grad)
        total_loss = cross_entropy_weight * sums[0] + kl_weight * sums[1]
        ctx.mark_non_differentiable(sums)
        return total_loss, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scaled_head = None if head_grad is None else head_grad * grad.to(head_grad.dtype)
        return (hidden_grad * grad.to(hidden_grad.dtype), scaled_head, *(None,) * 9)


def _only_used(values: Tensor, used: Tensor) -> Tensor:
    return values[used]


def _zeros_for_unused(values: Tensor, used: Tensor) -> Tensor:
    """As ``_only_used``, for a GPU: a number of rows that depends on values would have to be waited for."""
    used = used.view(used.shape + (1,) * (values.ndim - used.ndim))
    return torch.where(used, values, torch.zeros((), dtype=values.dtype, device=values.device)).flatten(0, 1)


def language_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    kl_factors: Tensor | None = None,
    is_answer: Tensor | None = None,
    cross_entropy_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> LanguageLosses:
    """Return weighted sums over tokens: loss, cross-entropy, KL divergence, and answers that are right.

    The loss is ``cross_entropy_weight * CE + kl_weight * temperature^2 * KL(teacher || student)``, both at
    the given token weights, KL at those times ``kl_factors``; divide by the sum of weights over all processes
    for a mean. Tokens of weight 0 are not looked at.

    Args:
        hidden: The student's last hidden states [B, T, hidden].
        head: The student's output matrix [V, hidden].
        targets: The token that follows each position [B, T].
        weights: The weight of each position [B, T], at least 0.
        teacher_hidden: The teacher's last hidden states [B, T, hidden]; needed where ``kl_weight`` is not 0.
        teacher_head: The teacher's output matrix.
        kl_factors: What the KL of each position counts beside its weight [B, T]; None for 1 everywhere.
        is_answer: Whether the token to come belongs to the answer of a task sample [B, T]; None for none.
        cross_entropy_weight: See above.
        kl_weight: See above.
        temperature: Divides both logits in the KL term.

    Returns:
        Four float32 scalars; only the first carries a gradient.
    """
    take = _only_used if hidden.device.type == "cpu" else _zeros_for_unused
    used = weights > 0
    loss, sums = _LanguageLoss.apply(  # type: ignore[no-untyped-call]
        take(hidden, used),
        head,
        None if teacher_hidden is None else take(teacher_hidden, used),
        head if teacher_head is None else teacher_head,
        take(targets, used),
        take(weights, used).float(),
        None if kl_factors is None else take(kl_factors, used).float(),
        None if is_answer is None else take(weights * is_answer, used).float(),
        cross_entropy_weight,
        kl_weight,
        temperature,
    )
    return LanguageLosses(loss, *sums.unbind())
