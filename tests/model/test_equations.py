"""The attention module against the paper's six equations, written out with loops over heads and tokens."""

from __future__ import annotations

import pytest
import torch
from model_variants import model_of, random_tokens
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

from comparison import assert_near
from lawcat.model.attention import LawcatAttention

FIELDS = [
    {},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "attention_bias": True},
    {"use_conv": False},
    {"conv_kernel_size": 2},
    {"use_normalizer": False},
    {"gate": "head"},
    {"gate": "none"},
    {"feature_dim": 4},
    {"linear_rope": True},
    {"use_qk_norm": True, "head_dim": 16, "rms_norm_eps": 0.1, "linear_rope": True},
    {"gate_divisor": 0.01, "min_log_decay": -2.0},
]


@torch.no_grad()
def by_the_book(attention: LawcatAttention, x: Tensor) -> Tensor:
    """One sequence x [T, hidden] in; the output before ``o_proj`` [T, H, D] out."""
    config = attention.config
    num_tokens, num_heads, num_groups, width = (
        len(x),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    # (1) The teacher's projections; (2) repeated to the query heads as the teacher repeats them.
    q = attention.q_proj(x).view(num_tokens, num_heads, width)
    k, v = (proj(x).view(num_tokens, num_groups, width) for proj in (attention.k_proj, attention.v_proj))
    if config.use_qk_norm:  # of each head by itself, in float32 as the teacher's

        def normed(t: Tensor, weight: Tensor) -> Tensor:
            size = torch.stack([head.square().mean() for row in t for head in row]).view(*t.shape[:2], 1)
            return t / (size + config.rms_norm_eps).sqrt() * weight

        q, k = normed(q, attention.q_norm.weight), normed(k, attention.k_norm.weight)
    if config.linear_rope:
        cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(num_tokens)[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
        q, k = q[0], k[0]

    def repeated(t: Tensor) -> Tensor:
        return repeat_kv(t.transpose(0, 1)[None], num_heads // num_groups)[0].transpose(0, 1)

    k, v = repeated(k), repeated(v)
    # (3) The convolution, a filter a channel, on q and on the repeated k.
    if config.use_conv:
        for name, t in (("q", q), ("k", k)):
            weight = getattr(attention, f"{name}_conv").weight.view(num_heads, width, -1)
            y = torch.zeros_like(t)
            for token in range(num_tokens):
                for tap in range(weight.shape[-1]):
                    earlier = token - (weight.shape[-1] - 1) + tap
                    if earlier >= 0:
                        y[token] += weight[..., tap] * t[earlier]
            q, k = (y, k) if name == "q" else (q, y)
    # (5) The gate.
    log_decay = torch.zeros(num_tokens, num_groups, 1, dtype=x.dtype)
    if config.gate != "none":
        gate = attention.decay_gate
        logits = (x @ gate.reduce.T) @ gate.expand.T + gate.bias
        log_decay = (F.logsigmoid(logits) / config.gate_divisor).clamp(min=config.min_log_decay)
        log_decay = log_decay.view(num_tokens, num_groups, -1)
    decay = repeated(log_decay).exp()

    output = torch.zeros(num_tokens, num_heads, width, dtype=x.dtype)
    for head in range(num_heads):
        matrix = attention.feature_map.weight[head]

        def phi(u: Tensor, matrix: Tensor = matrix) -> Tensor:  # (4)
            return torch.cat([(u @ matrix).softmax(-1), (-u @ matrix).softmax(-1)])

        n_state, z_state = (
            torch.zeros(config.feature_dim, width, dtype=x.dtype),
            torch.zeros(config.feature_dim),
        )
        for token in range(num_tokens):  # (6)
            features = phi(k[token, head])
            n_state = decay[token, head][:, None] * n_state + features[:, None] * v[token, head]
            z_state = decay[token, head] * z_state + features
            query = phi(q[token, head])
            output[token, head] = query @ n_state
            if config.use_normalizer:
                output[token, head] /= query @ z_state + config.normalizer_eps
    return output


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_six_equations(fields: dict[str, object]) -> None:
    attention = model_of(fields).attention_modules()[1]
    x = torch.randn(1, 35, 32, dtype=torch.float64)
    positions = LlamaRotaryEmbedding(attention.config)(x, torch.arange(35)[None])
    with torch.no_grad():
        actual = attention.linear_attention(x, *attention.project(x), positions)
    tolerance = 1e-6 if "use_qk_norm" in fields else 1e-11  # transformers' norm is in float32
    assert_near(actual[0], by_the_book(attention, x[0]), tolerance, "output")


@torch.no_grad()
def test_query_heads_read_the_group_that_repeat_kv_gives_them() -> None:
    """One value a kv head: query head h must put out that of group h // (H / G)."""
    attention = model_of({"num_attention_heads": 6, "num_key_value_heads": 2}).attention_modules()[0]
    for state_heads in ("query", "kv"):
        fields = {"num_attention_heads": 6, "num_key_value_heads": 2, "state_heads": state_heads}
        attention = model_of(fields).attention_modules()[0]
        x = torch.randn(1, 7, 32, dtype=torch.float64)
        q, k, _ = attention.project(x)
        v = torch.tensor([1.0, 2.0], dtype=torch.float64)[None, None, :, None].expand(1, 7, 2, 8)
        output = attention.linear_attention(x, q, k, v)
        expected = repeat_kv(v.transpose(1, 2), 3).transpose(1, 2)
        # Weights sum to one, but for eps.
        assert_near(output, expected, 1e-4, state_heads)


@torch.no_grad()
def test_a_state_a_kv_head_is_a_state_a_query_head_with_shared_parameters() -> None:
    small = model_of({"state_heads": "kv"})
    large = model_of({"state_heads": "query"})
    shared = {}
    for name, tensor in small.state_dict().items():
        if "k_conv" in name:
            tensor = tensor.view(2, 8, -1).repeat_interleave(2, dim=0).flatten(0, 1)
        elif "feature_map" in name:
            tensor = tensor.repeat_interleave(2, dim=0)
        shared[name] = tensor
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    large.load_state_dict(shared)
    tokens = random_tokens(2, 40)
    assert_near(small(tokens).logits, large(tokens).logits, 1e-12)
    large.load_state_dict(before)
