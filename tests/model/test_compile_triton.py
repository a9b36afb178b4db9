"""A compiled student on the kernels: one graph, the same results, on a CPU in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from model_variants import FULL, LINEAR, left_pad, random_tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from comparison import assert_near
from kernel_device import DEVICE, on_gpu
from lawcat import LawcatForCausalLM
from lawcat.ops import use_backend
from small_models import in_bfloat16, make_model

# As small as it goes: the interpreter takes milliseconds for every operation.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "num_hidden_layers": 1}
HYBRID = {"layer_types": [LINEAR, FULL], "num_hidden_layers": 2}
# The smallest of a real head.
WIDE = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "noise": 0.02}


@pytest.fixture(autouse=True)
def on_kernels() -> Iterator[None]:
    torch._dynamo.reset()
    with use_backend("triton"):
        yield


def tokens_of(*shape: int) -> Tensor:
    return random_tokens(*shape).to(DEVICE)


def operators(counter: CompileCounterWithBackend) -> list[list[str]]:
    """Those of lawcat in each graph."""
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    return [[target for target in graph if target.startswith("lawcat.")] for graph in targets]


def gradients(model: LawcatForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_training_is_one_graph() -> None:
    model = make_model(**(SMALL | HYBRID)).to(DEVICE).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    padded, mask, positions = (t.to(DEVICE) for t in left_pad(random_tokens(2, 6), [0, 2]))
    arguments = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    labels = padded.masked_fill(mask == 0, -100)
    theirs = model(padded, labels=labels, **arguments)
    ours = compiled(padded, labels=labels, **arguments)
    assert operators(counter) == [["lawcat.mixer"]]
    assert_near(ours.logits, theirs.logits, 1e-6)
    expected = gradients(model, theirs.loss)
    assert expected["model.layers.0.self_attn.decay_gate.expand"].any()
    for name, gradient in gradients(model, ours.loss).items():
        assert_near(gradient, expected[name], 1e-5, name)


@torch.no_grad()
def test_a_prompt_and_its_steps() -> None:
    """Each is one graph; the steps share one, and write the state where it lies."""
    model = make_model(**(SMALL | HYBRID)).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")

    def read(tokens, cache):
        return model(tokens, past_key_values=cache).logits

    compiled = torch.compile(read, fullgraph=True, backend=counter)
    ours, theirs = model.new_cache(), model.new_cache()
    states = []
    for tokens in tokens_of(2, 10).split([6, 1, 1, 1, 1], dim=1):
        assert_near(compiled(tokens, ours), read(tokens, theirs), 1e-6)
        states.append(ours.layers[0].recurrent)
    assert all(state is states[0] for state in states)
    for what, tensor in theirs.tensors().items():
        assert_near(ours.tensors()[what], tensor, 1e-6, what)
    # The last graph counts tokens by a symbol, so that no further step needs one of its own.
    assert operators(counter) == [["lawcat.mixer"], ["lawcat.decode_step"], ["lawcat.decode_step"]]


@torch.no_grad()
def test_a_compiled_model_generates() -> None:
    """With a mask, as ``generate`` gives it, a compiled step is made of PyTorch's operations."""
    model = make_model(**SMALL).to(DEVICE)
    padded, mask, _ = (t.to(DEVICE) for t in left_pad(random_tokens(2, 5), [0, 3]))
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(padded, **options)
    twin = copy.copy(model)
    counter = CompileCounterWithBackend("aot_eager")
    twin.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    assert torch.equal(twin.generate(padded, **options), expected)
    assert operators(counter)[0] == ["lawcat.mixer"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_training_by_inductor_on_a_gpu(mode: str | None) -> None:
    """In float32, where gradients of sums that cancel can be compared."""
    model = make_model(**WIDE).to(DEVICE).train()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    tokens = tokens_of(2, 300)
    expected = gradients(model, model(tokens, labels=tokens, use_cache=False).loss)
    for _ in range(4):  # by CUDA graphs from the third on
        torch.compiler.cudagraph_mark_step_begin()
        found = gradients(model, compiled(tokens, labels=tokens, use_cache=False).loss)
        for name, gradient in found.items():
            assert_near(gradient, expected[name], 1e-3, name)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_decoding_by_inductor_on_a_gpu(mode: str | None) -> None:
    """Against float32 on PyTorch's operations, as eager decoding is."""
    exact = make_model(**WIDE).to(DEVICE)
    tokens = tokens_of(4, 230)
    with use_backend("torch"):
        expected = exact(tokens).logits[:, 200:]
    model = in_bfloat16(exact)

    def read(tokens, cache):
        return model(tokens, past_key_values=cache).logits

    compiled = torch.compile(read, fullgraph=True, mode=mode)
    cache, pieces = model.new_cache(), []
    read(tokens[:, :200], cache)
    states = [layer.recurrent for layer in cache.layers]
    for token in tokens[:, 200:].split(1, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        pieces.append(compiled(token, cache).clone())
    assert_near(torch.cat(pieces, dim=1).float(), expected, 3e-2)
    assert all(layer.recurrent is state for layer, state in zip(cache.layers, states, strict=True))
