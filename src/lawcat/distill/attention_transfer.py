"""Stage 1, attention transfer: each layer's linear attention is fitted to the teacher's softmax attention.

The target is the output before ``o_proj``, on the same input (teacher forcing: what goes on to the next layer
is the teacher's). A layer's loss needs no graph through other layers, so its backward runs at once and only
one layer's activations are ever held. The teacher is the same model: its projections are frozen, so one
product gives q, k and v for both.

Source: LAWCAT (arXiv 2509.18467), section on distillation; dividing by the target's mean square is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lawcat.distill.gate_penalty import GatePenalty
from lawcat.distill.losses import relative_squared_error
from lawcat.model.causal_mask import causal_mask
from lawcat.model.modeling_lawcat import LawcatForCausalLM


def attention_transfer_losses(
    model: LawcatForCausalLM,
    input_ids: Tensor,
    *,
    gradient_scale: float | None = None,
    penalty: GatePenalty | None = None,
    answer_weight: float = 0.0,
    loss_weight: Tensor | None = None,
    answer_losses: list[Tensor] | None = None,
) -> Tensor:
    """Return the relative squared error of each linear layer, and add its gradients to the new parameters.

    Args:
        model: The student; its new parameters require gradients.
        input_ids: Tokens [B, T], without padding.
        gradient_scale: The gradient is that of ``gradient_scale * sum over layers of the mean over B``. None
            computes losses only.
        penalty: Of the gates, watching; its gradient is added too.
        answer_weight: What the same error counts beside it where answers are predicted.
        loss_weight: There what the prediction of token t counts, 0 elsewhere [B, T]; needed for the former.
        answer_losses: Gets that error of each layer, the mean over the B sequences.

    Returns:
        [linear layers], float32: the mean over the B sequences.
    """
    decoder: Any = model.model
    losses = []
    # The output at t predicts token t + 1.
    weight = None if loss_weight is None else torch.nn.functional.pad(loss_weight[:, 1:], (0, 1))
    with torch.no_grad():
        hidden = decoder.embed_tokens(input_ids)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        positions = decoder.rotary_emb(hidden, position_ids)
        # Given positions, it would look at them for packed sequences, and a GPU be waited for.
        mask = causal_mask(decoder.config, hidden)
        for layer in decoder.layers:
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            q, k, v = attention.project(x)
            target, _ = attention.softmax_attention(q, k, v, positions, mask)  # [B, T, H, D]
            if attention.is_linear:
                with torch.set_grad_enabled(gradient_scale is not None):
                    output = attention.linear_attention(x, q, k, v, positions)
                    loss = relative_squared_error(output, target).mean()
                    extra: Tensor | float = 0.0
                    if weight is not None and answer_weight:
                        of_answers = relative_squared_error(output, target, weight).mean()
                        extra = answer_weight * of_answers
                        if answer_losses is not None:
                            answer_losses.append(of_answers.detach())
                    if gradient_scale is not None:
                        if penalty is not None:
                            extra = extra + penalty.take(is_mean_over_layers=False)
                        torch.autograd.backward((loss + extra) * gradient_scale)
                losses.append(loss.detach())
            hidden = layer.add_mlp(hidden + attention.o_proj(target.flatten(2)))
    return torch.stack(losses)
