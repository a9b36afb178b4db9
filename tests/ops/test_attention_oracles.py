"""The definition against two oracles that are not ours: ONNX's evaluator and a masked quadratic form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import Case
from torch import Tensor

from comparison import assert_near
from lawcat.ops import gated_linear_attention, gated_linear_attention_reference

DECAYS = ["none", "vanishing", "moderate", "bound or slow", "everything"]


def onnx_gated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run ONNX's ``LinearAttention`` with the update rule "gated": output [B, T, H, D] and state."""
    pytest.importorskip("onnx", minversion="1.22")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    names = ["query", "key", "value", "past_state", "decay"]
    node = helper.make_node(
        "LinearAttention",
        names,
        ["output", "present_state"],
        update_rule="gated",
        q_num_heads=q.shape[2],
        kv_num_heads=k.shape[2],
        scale=1.0,
    )
    graph = helper.make_graph(
        [node],
        "gated",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)])
    packed = {"query": q, "key": k, "value": v, "decay": log_decay}
    feeds = {name: t.flatten(2) for name, t in packed.items()} | {"past_state": state}
    output, state_after = ReferenceEvaluator(model).run(
        None, {name: t.detach().float().numpy() for name, t in feeds.items()}
    )
    output = torch.from_numpy(np.asarray(output)).unflatten(-1, (q.shape[2], v.shape[-1]))
    return output, torch.from_numpy(np.asarray(state_after))


@pytest.mark.parametrize("is_per_head", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)], ids=str)
def test_onnx_reference_evaluator(heads: tuple[int, int], decay: str, is_per_head: bool) -> None:
    case = Case(19, decay, *heads, is_per_head=is_per_head)
    inputs = case.inputs(torch.float32)
    q, k, v, log_decay, state = inputs.values()
    # The normaliser is one more value, which is 1 for every token.
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    read, expected_state = onnx_gated(q, k, values, log_decay, state)
    for form in (gated_linear_attention_reference, gated_linear_attention):
        plain, state_after = form(q, k, v, log_decay, initial_state=state, normalize=False)
        assert_near(state_after, expected_state, 2e-6, "state")
        assert_near(plain, read[..., :-1], 2e-6, "numerator")
        output, _ = form(q, k, v, log_decay, initial_state=state, eps=1e-6)
        assert_near(output, read[..., :-1] / (read[..., -1:] + 1e-6), 2e-6, "output")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS[:-1])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_masked_quadratic_form(heads: tuple[int, int], decay: str, normalize: bool) -> None:
    """``o_i = sum_j w_ij v_j / (sum_j w_ij + eps)``, ``w_ij = sum_f q_if k_jf prod_(j < t <= i) a_tf``."""
    case = Case(23, decay, *heads, has_state=False, normalize=normalize)
    q, k, v, log_decay, _ = case.inputs().values()
    group = heads[0] // heads[1]
    k, v, log_decay = (t.repeat_interleave(group, dim=2) for t in (k, v, log_decay))
    total = log_decay.cumsum(1)
    exponents = total[:, :, None] - total[:, None, :]  # [B, i, j, H, F]
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[None, :, :, None]
    weights = torch.einsum("bihf,bjhf,bijhf->bijh", q, k, exponents.exp()).where(causal, 0.0)
    expected = torch.einsum("bijh,bjhd->bihd", weights, v)
    if normalize:
        expected = expected / (weights.sum(2)[..., None] + 1e-6)

    q, k, v, log_decay, _ = case.inputs().values()
    output, _ = gated_linear_attention_reference(q, k, v, log_decay, normalize=normalize)
    assert_near(output, expected, 1e-12, "output")


def test_without_decay_and_with_exponential_features_it_is_softmax_attention() -> None:
    """The weights sum to one as softmax's do: one feature a pair of tokens makes them the same."""
    tokens, width = 12, 4
    queries, keys = torch.randn(1, tokens, 1, width), torch.randn(1, tokens, 1, width)
    values = torch.randn(1, tokens, 1, width)
    scores = torch.einsum("bihd,bjhd->bijh", queries, keys)[..., 0]
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, scale=1.0
    ).transpose(1, 2)
    # q_i = exp(scores of token i), k_j = the unit vector of token j: q_i k_j = exp(score_ij).
    q, k = scores.exp()[:, :, None], torch.eye(tokens)[None, :, None]
    output, _ = gated_linear_attention(q, k, values, torch.zeros_like(k))
    assert_near(output, expected, 1e-5, "output")
