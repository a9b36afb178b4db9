"""The cache: constant size, copies, rows, forgetting."""

from __future__ import annotations

import copy

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens

from comparison import assert_near
from lawcat import LawcatCache, LawcatForCausalLM
from lawcat.model.cache import LinearAttentionState
from small_models import make_config, make_model

NAMES = ["paper", "no convolution", "state a kv head", "hybrid", "hybrid, softmax first"]
WINDOW_NAMES = ["lolcats", "sinks in a window", "sliding, with sinks", "three kinds"]


@pytest.fixture(params=[*NAMES, *WINDOW_NAMES])
def model(request: pytest.FixtureRequest) -> LawcatForCausalLM:
    return model_of(VARIANTS[request.param])


@torch.no_grad()
def read(model: LawcatForCausalLM, *shape: int) -> LawcatCache:
    return model(random_tokens(*shape), use_cache=True).past_key_values


@torch.no_grad()
def continued(model: LawcatForCausalLM, cache: LawcatCache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["paper", "no convolution", "state a kv head"])
def test_state_bytes_do_not_grow(name: str, dtype: torch.dtype) -> None:
    """The same to the byte after 1 token, 1K and 5K, with a mask and without, in one piece or by token."""
    model = model_of(VARIANTS[name], dtype)
    config = model.config
    sizes = set()
    for tokens in (1, 1000, 5000):
        cache = read(model, 1, tokens)
        sizes.add(cache.state_bytes())
        for masked in (True, False):
            mask = torch.ones(1, cache.get_seq_length() + 1) if masked else None
            model(random_tokens(1, 1), attention_mask=mask, past_key_values=cache)
            sizes.add(cache.state_bytes())
    per_layer = 4 * config.num_state_heads * 8 * 9
    if config.use_conv:
        per_layer += dtype.itemsize * (4 + config.num_state_heads) * 8 * 3
    assert sizes == {2 * per_layer}


@torch.no_grad()
def test_only_softmax_layers_grow() -> None:
    model = model_of(VARIANTS["hybrid"], torch.float32)
    short, long = read(model, 1, 10), read(model, 1, 20)
    assert long.state_bytes() - short.state_bytes() == 10 * 2 * 2 * 8 * 4
    assert long.layers[0].tensors().keys() == {"recurrent", "q_inputs", "k_inputs"}


def test_an_empty_cache_holds_nothing(model: LawcatForCausalLM) -> None:
    cache = model.new_cache()
    assert isinstance(cache, LawcatCache)
    assert cache.get_seq_length() == 0
    assert cache.state_bytes() == 0
    assert cache.tensors() == {}


def test_no_longest_sequence(model: LawcatForCausalLM) -> None:
    cache = read(model, 1, 5)
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    assert not cache.is_compileable


def test_tensors_are_named_by_layer(model: LawcatForCausalLM) -> None:
    names = read(model, 1, 5).tensors().keys()
    assert {name.split(".")[1] for name in names} == set(map(str, range(len(model.model.layers))))
    known = {"keys", "values", *LinearAttentionState._TENSORS}
    assert {name.split(".")[2] for name in names} <= known


def test_a_fork_goes_its_own_way(model: LawcatForCausalLM) -> None:
    cache = read(model, 2, 9)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    fork, tokens = cache.fork(), random_tokens(2, 4)
    expected = continued(model, copy.deepcopy(cache), tokens)
    assert_near(continued(model, fork, tokens), expected, 1e-14)
    for tensor in fork.tensors().values():
        tensor.zero_()
    fork.reset()
    assert cache.get_seq_length() == 9
    assert all(torch.equal(cache.tensors()[name], tensor) for name, tensor in before.items())
    assert_near(continued(model, cache, tokens), expected, 1e-14)


def test_a_fork_with_gradients() -> None:
    model = make_model()
    cache = model(random_tokens(1, 9), use_cache=True).past_key_values
    fork = cache.fork()
    fork.layers[0].recurrent.sum().backward()
    assert model.attention_modules()[0].v_proj.weight.grad is not None


def test_reset_forgets(model: LawcatForCausalLM) -> None:
    cache, tokens = read(model, 2, 9), random_tokens(2, 5)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.state_bytes() == 0
    assert_near(continued(model, cache, tokens), model(tokens).logits, 1e-14)


@torch.no_grad()
def test_rows(model: LawcatForCausalLM) -> None:
    prompt, tokens = random_tokens(3, 9), random_tokens(3, 4)

    def cache() -> LawcatCache:
        return model(prompt, use_cache=True).past_key_values

    expected = continued(model, cache(), tokens)
    rows = torch.tensor([2, 0])
    selected = cache()
    selected.batch_select_indices(rows)
    assert_near(continued(model, selected, tokens[rows]), expected[rows], 1e-13)
    reordered = cache()
    reordered.reorder_cache(rows)
    assert_near(continued(model, reordered, tokens[rows]), expected[rows], 1e-13)
    repeated = cache()
    repeated.batch_repeat_interleave(2)
    actual = continued(model, repeated, tokens.repeat_interleave(2, dim=0))
    assert_near(actual, expected.repeat_interleave(2, dim=0), 1e-13)


def test_to_another_device() -> None:
    cache = read(model_of(VARIANTS["hybrid"]), 1, 4)
    assert cache.to("meta") is cache
    assert {tensor.device.type for tensor in cache.tensors().values()} == {"meta"}


def test_the_last_tokens_cannot_be_forgotten() -> None:
    cache = read(model_of(VARIANTS["paper"]), 1, 9)
    assert not cache.is_croppable if hasattr(cache, "is_croppable") else True
    cache.crop(0)
    with pytest.raises(ValueError, match=r"cannot be taken back .* cache\.fork\(\)"):
        cache.crop(-2)


def test_linear_layers_keep_no_keys() -> None:
    cache = model_of(VARIANTS["paper"]).new_cache()
    with pytest.raises(TypeError, match="no keys and values"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)


def test_offloading_leaves_a_state_where_it_is() -> None:
    cache = read(model_of(VARIANTS["paper"]), 1, 9)
    before = cache.tensors()
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert cache.tensors().keys() == before.keys()


def test_a_cache_of_other_layers_is_refused() -> None:
    cache = LawcatCache(make_config(layer_types=["full_attention", "linear_attention"]))
    with pytest.raises(ValueError, match="past_key_values was made for other layers"):
        model_of(VARIANTS["hybrid"])(random_tokens(1, 3), past_key_values=cache)


@torch.no_grad()
def test_a_state_continues_in_the_dtype_it_has() -> None:
    """float32 in a bfloat16 model: a state that was rounded each token would drift."""
    model = model_of(VARIANTS["paper"], torch.bfloat16)
    cache = read(model, 1, 9)
    for _ in range(3):
        model(random_tokens(1, 1), past_key_values=cache)
    assert {layer.recurrent.dtype for layer in cache.layers} == {torch.float32}
    assert {layer.q_inputs.dtype for layer in cache.layers} == {torch.bfloat16}
