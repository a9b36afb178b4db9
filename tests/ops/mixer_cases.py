"""Inputs of the whole mixer, and its definition in float64, step by step: what every form must give."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lawcat.ops import gated_linear_attention_reference

# What a gradient is taken of.
LEARNED = ("q", "k", "v", "gate", "map_weight", "q_taps", "k_taps", "initial_state")


@dataclass(frozen=True)
class MixerCase:
    """One call; hashable, so that the definition's answer is computed once. Sizes as in ``fused.py``."""

    tokens: int
    heads: int = 2
    kv_heads: int = 1
    state_heads: int = 2
    width: int = 16
    feature_dim: int = 16
    taps: int | None = 4
    batch: int = 1
    gate_width: int | None = None
    gate_scale: float = 1.0
    gate_is_logit: bool = True
    min_log_decay: float = -2.5
    has_state: bool = True
    padding: int = 0
    boundaries: tuple[int, ...] | None = None
    normalize: bool = True

    def tensors(
        self,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        rounded_to: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """Return fresh tensors, those that are learned as leaves that want a gradient."""
        torch.manual_seed(1)
        b, t, h, g, n = self.batch, self.tokens, self.heads, self.kv_heads, self.state_heads
        d, f = self.width, self.feature_dim
        sequences = b if self.boundaries is None else len(self.boundaries) - 1
        gate = self.gate_scale * torch.randn(b, t, g, self.gate_width or f, dtype=torch.float64)
        tensors = {
            "q": torch.randn(b, t, h, d, dtype=torch.float64),
            "k": torch.randn(b, t, g, d, dtype=torch.float64),
            "v": torch.randn(b, t, g, d, dtype=torch.float64),
            "gate": gate if self.gate_is_logit else (-gate.abs()).clamp(min=self.min_log_decay),
            "map_weight": 0.3 * torch.randn(n, d, f // 2, dtype=torch.float64),
        }
        if self.taps is not None:
            tensors["q_taps"] = torch.randn(h * d, self.taps, dtype=torch.float64)
            tensors["k_taps"] = torch.randn(n * d, self.taps, dtype=torch.float64)
        if self.has_state:
            # As three earlier tokens leave it: the normaliser and what it divides belong together.
            values = torch.randn(sequences, n, 3, d, dtype=torch.float64)
            values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
            earlier = torch.rand(sequences, n, 3, f, dtype=torch.float64)
            tensors["initial_state"] = earlier.transpose(-1, -2) @ values
            if self.taps is not None:
                tensors["q_inputs"] = torch.randn(sequences, h * d, self.taps - 1, dtype=torch.float64)
                tensors["k_inputs"] = torch.randn(sequences, n * d, self.taps - 1, dtype=torch.float64)
        tensors = {name: tensor.to(rounded_to).to(device, dtype) for name, tensor in tensors.items()}
        for name in LEARNED:
            if name in tensors:
                tensors[name].requires_grad_()
        if self.padding:
            first = self.padding * (torch.arange(b) % 2 == 0)
            tensors["mask"] = (torch.arange(t) >= first[:, None]).long().to(device)
        return tensors

    def options(self) -> dict[str, object]:
        """Return the arguments that are no tensors."""
        return {
            "gate_is_logit": self.gate_is_logit,
            "min_log_decay": self.min_log_decay,
            "boundaries": self.boundaries,
            "normalize": self.normalize,
        }

    def weights(self, output: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what output and state are multiplied with before they are summed to a loss."""
        torch.manual_seed(2)
        weights = (torch.randn(x.shape, dtype=torch.float64).to(x) for x in (output, state))
        return next(weights), next(weights)


def run(
    function: object,
    case: MixerCase,
    dtype: torch.dtype,
    device: str = "cpu",
    rounded_to: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return output, state, the convolutions' last inputs and the gradients of all that is learned."""
    tensors = case.tensors(dtype, device, rounded_to)
    output, state, q_inputs, k_inputs = function(**tensors, **case.options())  # type: ignore[operator]
    names = [name for name in LEARNED if name in tensors]
    output_weights, state_weights = case.weights(output, state)
    loss = (output * output_weights).sum() + (state * state_weights).sum()
    gradients = torch.autograd.grad(loss, [tensors[name] for name in names])
    results = {"output": output, "state": state}
    if q_inputs is not None:
        results |= {"q_inputs": q_inputs, "k_inputs": k_inputs}
    return results | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}


@functools.cache
def answer(case: MixerCase, rounded_to: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return what the definition gives in float64 of inputs that were rounded to another dtype."""
    return run(definition, case, torch.float64, rounded_to=rounded_to)


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    q_taps: Tensor | None = None,
    k_taps: Tensor | None = None,
    initial_state: Tensor | None = None,
    q_inputs: Tensor | None = None,
    k_inputs: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: tuple[int, ...] | None = None,
    gate_is_logit: bool = True,
    min_log_decay: float = -2.5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The mixer by other means: repeat_interleave, F.conv1d, a head's map at a time, a token at a time."""
    if boundaries is not None:
        parts = []
        for s in range(len(boundaries) - 1):
            start, stop = boundaries[s : s + 2]
            tokens = [x[:, start:stop] for x in (q, k, v, gate)]
            before = [None if x is None else x[s : s + 1] for x in (initial_state, q_inputs, k_inputs)]
            parts.append(
                definition(
                    *tokens, map_weight, q_taps, k_taps, *before,
                    gate_is_logit=gate_is_logit, min_log_decay=min_log_decay, normalize=normalize,
                )
            )  # fmt: skip
        joined = [torch.cat([part[0] for part in parts], dim=1)]
        for index in range(1, 4):
            items = [part[index] for part in parts]
            joined.append(None if items[0] is None else torch.cat(items))
        return tuple(joined)
    heads, state_heads = q.shape[2], map_weight.shape[0]
    log_decay = gate
    if gate_is_logit:
        log_decay = -torch.logaddexp(torch.zeros_like(gate), -gate) / 16
        log_decay = log_decay.clamp(
            min=min_log_decay
        )  # as where it is made: the gradient passes at the bound
    k, v, log_decay = (x.repeat_interleave(state_heads // x.shape[2], dim=2) for x in (k, v, log_decay))
    if mask is not None:
        padded = mask[:, :, None, None] == 0
        q, k, log_decay = (x.masked_fill(padded, 0.0) for x in (q, k, log_decay))

    def convolve(x: Tensor, taps: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = taps.shape[1] - 1
        channels = x.flatten(2).transpose(1, 2)
        if before is None:
            before = torch.zeros_like(channels[:, :, :1]).expand(-1, -1, kept)
        extended = torch.cat([before, channels], dim=2)
        y = functional.conv1d(extended, taps[:, None], groups=taps.shape[0])
        return y.transpose(1, 2).view(x.shape), extended[:, :, extended.shape[2] - kept :]

    q_after = k_after = None
    if q_taps is not None:
        q, q_after = convolve(q, q_taps, q_inputs)
        k, k_after = convolve(k, k_taps, k_inputs)

    def phi(x: Tensor) -> Tensor:
        per_head = []
        for head in range(x.shape[2]):
            u = x[:, :, head] @ map_weight[head * state_heads // x.shape[2]]
            per_head.append(torch.cat([torch.softmax(u, -1), torch.softmax(-u, -1)], dim=-1))
        return torch.stack(per_head, dim=2)

    assert heads % state_heads == 0
    features = phi(k)
    if mask is not None:
        features = features.masked_fill(padded, 0.0)
    output, state = gated_linear_attention_reference(
        phi(q), features, v, log_decay, initial_state=initial_state, normalize=normalize
    )
    return output, state, q_after, k_after
