"""Windows of softmax in linear layers and alone, against a dense matrix of weights a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_variants import VARIANTS, WINDOW_VARIANTS, left_pad, model_of, random_tokens
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.model.attention import LawcatAttention
from lawcat.ops.reference import windowed_linear_attention_reference
from lawcat.ops.shapes import repeat_heads
from small_models import make_model

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"


def rotated(config: Any, t: Tensor, positions: Tensor) -> Tensor:
    cos, sin = LlamaRotaryEmbedding(config)(t, positions)
    return apply_rotary_pos_emb(t, t, cos, sin, unsqueeze_dim=2)[0]


def dense_scores(attention: LawcatAttention, q: Tensor, k: Tensor, is_real: Tensor) -> Tensor:
    """The softmax's logits [B, H, T, T], each pair rotated by itself to the positions at which it meets."""
    config = attention.config
    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    k = k.repeat_interleave(groups, dim=2)
    batch, tokens = is_real.shape
    index = (is_real.cumsum(1) - 1).clamp(min=0)
    scores = q.new_zeros(batch, config.num_attention_heads, tokens, tokens)
    for t in range(tokens):
        query_at, key_at = index[:, t : t + 1].expand(-1, tokens), index
        # To a sink the distance is bounded by what sinks and window hold.
        bounded = query_at.clamp(max=config.num_sinks + config.sliding_window - 1)
        query_at = torch.where(index < config.num_sinks, bounded, query_at)
        queries = rotated(config, q[:, t : t + 1].expand(-1, tokens, -1, -1), query_at)
        keys = rotated(config, k, key_at)
        scores[:, :, t] = (queries * keys).sum(-1).transpose(1, 2) / width**0.5
    return scores


@torch.no_grad()
def by_the_book(attention: LawcatAttention, x: Tensor, is_real: Tensor | None = None) -> Tensor:
    """The output before ``o_proj`` [B, T, H, D]."""
    config, window = attention.config, attention.config.sliding_window
    if is_real is None:
        is_real = torch.ones(x.shape[:2], dtype=torch.bool)
    q, k, v = attention.project(x)
    scores = dense_scores(attention, q, k, is_real)
    options = {"window": window, "num_sinks": config.num_sinks, "is_real": is_real}
    if attention.kind == SLIDING:
        nothing = torch.zeros(*q.shape[:3], 1, dtype=x.dtype)
        groups = config.num_attention_heads // config.num_key_value_heads
        v = v.repeat_interleave(groups, dim=2)
        return windowed_linear_attention_reference(
            scores, nothing, nothing, v, nothing, eps=1e-300, **options
        )
    keep = is_real[..., None, None].to(x.dtype)
    if config.linear_rope:
        index = (is_real.cumsum(1) - 1).clamp(min=0)
        q, k = rotated(config, q, index), rotated(config, k, index)
    log_decay = x.new_zeros(*x.shape[:2], attention.num_kv_heads, 1)
    if attention.config.gate != "none":
        log_decay = attention.decay_gate.log_decay(attention.decay_gate(x)) * keep
    k, v, log_decay = (repeat_heads(t, attention.num_state_heads) for t in (k, v, log_decay))
    q, k = q * keep, k * keep
    if config.use_conv:
        q, k = attention.q_conv(q, None)[0], attention.k_conv(k, None)[0]
    if config.feature_map == "tied":
        q, k = attention.feature_map(q), attention.feature_map(k)
    else:
        q, k = attention.q_feature_map(q), attention.k_feature_map(k)
    return windowed_linear_attention_reference(
        scores,
        q,
        k,
        v,
        log_decay,
        factor=attention.window.scale.sigmoid(),
        normalize=config.use_normalizer,
        eps=config.normalizer_eps,
        **options,
    )


def output_of(attention: LawcatAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    index = torch.arange(x.shape[1])[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    positions = LlamaRotaryEmbedding(attention.config)(x, index)
    projected = attention.project(x)
    if attention.kind == SLIDING:
        return attention.sliding_attention(*projected, positions, mask)
    return attention.linear_attention(x, *projected, positions, mask)


def windowed(name: str) -> list[LawcatAttention]:
    modules = model_of(VARIANTS[name]).attention_modules()
    return [module for module in modules if module.window is not None]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6, 35])
@pytest.mark.parametrize("name", WINDOW_VARIANTS)
def test_a_dense_matrix_of_weights(name: str, tokens: int) -> None:
    for attention in windowed(name):
        x = torch.randn(2, tokens, 32, dtype=torch.float64)
        assert_near(output_of(attention, x), by_the_book(attention, x), 1e-11, attention.kind)


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOW_VARIANTS)
def test_padding_on_either_side_and_between(name: str) -> None:
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :7], mask[1, 20:], mask[2, 11:14] = 0, 0, 0
    for attention in windowed(name):
        x = torch.randn(3, 30, 32, dtype=torch.float64)
        actual, expected = output_of(attention, x, mask), by_the_book(attention, x, mask.bool())
        assert_near(actual[mask.bool()], expected[mask.bool()], 1e-11, attention.kind)
        assert actual.isfinite().all()


@pytest.mark.parametrize("name", ["window of one", "window, strong bound", "lolcats", "sinks in a window"])
def test_gradients_of_a_dense_matrix(name: str) -> None:
    attention = windowed(name)[0]
    x = torch.randn(1, 23, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 23, 4, 8, dtype=torch.float64)
    leaves = [x, *attention.parameters()]
    results = []
    for output in (output_of(attention, x), by_the_book.__wrapped__(attention, x)):
        results.append(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        if expected is not None:
            assert_near(actual, expected, 1e-9)


@torch.no_grad()
def test_long_inputs_are_taken_in_segments() -> None:
    """More tokens than a segment has, and no multiple of anything."""
    for name in ("lolcats", "sliding, with sinks"):
        model = model_of(VARIANTS[name])
        tokens = random_tokens(1, 2100)
        cache, logits = model.new_cache(), []
        for start in range(0, 2100, 300):
            logits.append(model(tokens[:, start : start + 300], past_key_values=cache).logits)
        assert_near(model(tokens).logits, torch.cat(logits, dim=1), 1e-11, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["no gate", "paper", "rope", "state a kv head"])
def test_a_window_longer_than_the_input_leaves_nothing_to_the_state(name: str) -> None:
    """Then the linear part has no say, and with weights that sum to one the factor has none either."""
    fields = VARIANTS[name] | {"sliding_window": 50}
    model = model_of(fields)
    tokens = random_tokens(2, 40)
    cache = model.new_cache()
    actual = model(tokens, past_key_values=cache).logits
    with model.teacher_mode():
        expected = model(tokens).logits
    # But for eps beside factors of a tenth and weights of one.
    assert_near(actual, expected, 2e-4)
    assert not any(layer.recurrent.any() for layer in cache.layers)


@torch.no_grad()
def test_sliding_layers_are_the_teacher_up_to_window_and_sinks() -> None:
    model = model_of({"layer_types": [SLIDING] * 2, "sliding_window": 9, "num_sinks": 3})
    tokens = random_tokens(2, 40)
    with model.teacher_mode():
        expected = model(tokens).logits
    actual = model(tokens).logits
    assert_near(actual[:, :12], expected[:, :12], 1e-12)
    assert (actual[:, 12] - expected[:, 12]).abs().max() > 1e-3


@torch.no_grad()
def test_a_window_forgets_and_a_state_does_not() -> None:
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[:, 3] += 1

    def difference(**fields: object) -> Tensor:
        model = model_of({"num_hidden_layers": 1, "sliding_window": 5} | fields)
        return (model(tokens).logits - model(changed).logits).abs().amax((0, 2))

    sliding, sinks = {"layer_types": [SLIDING]}, {"layer_types": [SLIDING], "num_sinks": 4}
    changes = difference(**sliding)
    assert (changes[3:8] > 1e-6).all()
    assert not changes[8:].any()
    assert (difference(**sinks)[3:] > 1e-9).all()
    assert (difference(layer_types=[LINEAR])[3:] > 1e-9).all()


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOW_VARIANTS)
def test_a_cache_of_one_size(name: str) -> None:
    """To the byte, from the first token on, in one piece or by token, with a mask and without."""
    model = model_of(VARIANTS[name], torch.float32)
    if FULL in model.config.layer_types:
        pytest.skip("softmax layers grow")
    sizes = set()
    for tokens in (1, 3, 50, 1000):
        cache = model(random_tokens(2, tokens), use_cache=True).past_key_values
        sizes.add(cache.state_bytes())
        mask = torch.ones(2, tokens + 2)
        model(random_tokens(2, 2), attention_mask=mask, past_key_values=cache)
        model(random_tokens(2, 1), past_key_values=cache)
        sizes.add(cache.state_bytes())
        for tensor_name, tensor in cache.tensors().items():
            storage = tensor.untyped_storage().nbytes()
            assert storage == tensor.numel() * tensor.element_size(), f"{tensor_name} holds on to more"
    assert len(sizes) == 1


@torch.no_grad()
def test_what_a_window_keeps() -> None:
    """Keys and values as the teacher's cache has them, features and decays; no more."""
    model = model_of(VARIANTS["sinks in a window"], torch.bfloat16)
    cache = model(random_tokens(1, 30), use_cache=True).past_key_values
    layer = cache.layers[0]
    window, sinks = model.config.sliding_window, model.config.num_sinks
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in layer.tensors().items()}
    assert shapes == {
        "recurrent": (4, 8, 9),
        "q_inputs": (32, 3),
        "k_inputs": (32, 3),
        "window_keys": (window, 2, 8),
        "window_values": (window, 2, 8),
        "window_is_visible": (window,),
        "window_features": (window, 4, 8),
        "window_log_decay": (window, 2, 8),
        "sink_keys": (sinks, 2, 8),
        "sink_values": (sinks, 2, 8),
        "num_real": (),
    }
    assert layer.window_keys.dtype == layer.sink_values.dtype == torch.bfloat16
    assert layer.window_features.dtype == layer.window_log_decay.dtype == torch.float32
    sliding = model_of(VARIANTS["sliding"], torch.bfloat16)
    names = sliding(random_tokens(1, 30), use_cache=True).past_key_values.layers[0].tensors().keys()
    assert names == {"window_keys", "window_values", "window_is_visible"}


@torch.no_grad()
def test_sinks_are_the_first_real_tokens_wherever_they_come() -> None:
    """Left padding, and a prompt in pieces of which the first holds fewer tokens than there are sinks."""
    model = model_of(VARIANTS["sliding, with sinks"])
    tokens = random_tokens(2, 20)
    padded, mask, positions = left_pad(tokens, [0, 6])
    cache = model.new_cache()
    for start, stop in ((0, 1), (1, 2), (2, 8), (8, 9), (9, 26)):
        model(
            padded[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
        )
    layer = cache.layers[0]
    assert layer.num_real.tolist() == [20, 20]
    expected = model(tokens, use_cache=True).past_key_values.layers[0]
    assert_near(layer.sink_keys[1], expected.sink_keys[1], 1e-12)
    assert_near(layer.sink_values[1], expected.sink_values[1], 1e-12)


@torch.no_grad()
def test_positions_that_are_given_are_used() -> None:
    """Only differences count, within a window as in the teacher."""
    model = model_of(VARIANTS["sliding"])
    tokens, positions = random_tokens(1, 20), torch.arange(20)[None]
    expected = model(tokens).logits
    assert_near(model(tokens, position_ids=positions + 1000).logits, expected, 1e-5)
    assert (model(tokens, position_ids=2 * positions).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_half_precision_rounds_and_no_more() -> None:
    for name in ("lolcats", "sinks in a window", "sliding, with sinks"):
        tokens = random_tokens(2, 50)
        expected = model_of(VARIANTS[name])(tokens).logits
        assert_near(model_of(VARIANTS[name], torch.float32)(tokens).logits, expected, 1e-5, name)
        short = model_of(VARIANTS[name], torch.bfloat16)
        assert_near(short(tokens).logits, expected, 0.1, name)
        if short.attention_modules()[0].window.scale is not None:
            # As loading does it; .to() casts what it is told to.
            assert "window" in short.model._keep_in_fp32_modules_strict


def test_large_scores_do_not_overflow() -> None:
    model = make_model(**VARIANTS["lolcats"])
    with torch.no_grad():
        for attention in model.attention_modules():
            attention.q_proj.weight.mul_(100)
            attention.k_proj.weight.mul_(100)
    loss = model(random_tokens(2, 30)).logits.square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_where_the_factor_starts() -> None:
    model = make_model(noise=0.0, **VARIANTS["lolcats"])
    for attention in model.attention_modules():
        assert attention.window.scale.shape == (4,)
        assert_near(attention.window.scale.sigmoid(), torch.full((4,), 0.1), 1e-7)


def test_untied_maps_start_alike_and_part() -> None:
    model: LawcatForCausalLM = make_model(noise=0.0, feature_map="untied", state_heads="kv")
    attention = model.attention_modules()[0]
    assert not hasattr(attention, "feature_map")
    assert attention.q_feature_map.weight.shape == (4, 8, 4)
    assert attention.k_feature_map.weight.shape == (2, 8, 4)
    for module in (attention.q_feature_map, attention.k_feature_map):
        assert torch.equal(module.weight, module.initial_value())
    tied = make_model(noise=0.0, state_heads="kv")
    tokens = random_tokens(1, 20)
    for name, parameter in tied.named_parameters():
        if name.endswith("decay_gate.reduce"):
            dict(model.named_parameters())[name].data.copy_(parameter)
    model.load_state_dict(tied.state_dict(), strict=False)
    assert_near(model(tokens).logits, tied(tokens).logits, 1e-6)


def test_sliding_layers_have_no_new_parameters() -> None:
    model = make_model(layer_types=[SLIDING, FULL], sliding_window=4, num_sinks=2)
    teacher = make_model(layer_types=[FULL, FULL])
    assert model.state_dict().keys() == teacher.state_dict().keys()


@torch.no_grad()
def test_a_mask_of_softmax_is_refused() -> None:
    """It does not tell padding from tokens outside a window."""
    model = model_of(VARIANTS["three kinds"])
    mask = {LINEAR: None, FULL: None, SLIDING: torch.zeros(1, 1, 4, 4)}
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(random_tokens(1, 4), attention_mask=mask)
    mask[SLIDING] = torch.ones(1, 4)
    tokens = random_tokens(1, 4)
    assert torch.equal(model(tokens, attention_mask=mask).logits, model(tokens).logits)
