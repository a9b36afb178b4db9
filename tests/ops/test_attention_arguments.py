"""Arguments that do not fit together are refused by name, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lawcat.ops import (
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
    gated_linear_attention_step,
)

SHAPES = {
    "q": (2, 1, 4, 6),
    "k": (2, 1, 2, 6),
    "v": (2, 1, 2, 5),
    "log_decay": (2, 1, 2, 6),
    "initial_state": (2, 2, 6, 6),
}
FORMS = [
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
    gated_linear_attention_step,
]


def call(form, tensors: dict[str, Tensor], **options: object):
    tensors = dict(tensors)
    state = tensors.pop("initial_state")
    return form(*tensors.values(), initial_state=state, **options)


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in (SHAPES | shapes).items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_right_shapes_are_taken(form) -> None:
    call(form, zeros())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 1, 4), "four dimensions .* got 3, 4, 4 and 4"),
        ("v", (2, 1, 2), "four dimensions"),
        ("k", (1, 1, 2, 6), r"k is \(1, 1, 2, 6\); with q \(2, 1, 4, 6\) it must be \[B, T, N, F\]"),
        ("k", (2, 2, 2, 6), "k is"),
        ("k", (2, 1, 2, 5), "k is"),
        ("v", (1, 1, 2, 5), r"v is \(1, 1, 2, 5\); with k \(2, 1, 2, 6\) it must be \[B, T, G, D\]"),
        ("v", (2, 3, 2, 5), "v is"),
        ("v", (2, 1, 4, 5), "v is .* the heads of k a multiple of G"),
        ("v", (2, 1, 0, 5), "v is .* the heads of k a multiple of G"),
        ("v", (2, 1, 1, 5), r"log_decay is .* it must be \(2, 1, 1, 6\) or end in 1"),
        ("q", (2, 1, 3, 6), "q has 3 heads, which must be a multiple of the 2 of k"),
        (
            "log_decay",
            (2, 1, 2, 2),
            r"log_decay is \(2, 1, 2, 2\); it must be \(2, 1, 2, 6\) or end in 1",
        ),
        ("log_decay", (2, 1, 4, 6), "log_decay is"),
        ("log_decay", (2, 2, 2, 6), "log_decay is"),
        ("initial_state", (2, 2, 6, 5), r"initial_state is .* = \(2, 2, 6, 6\)"),
        ("initial_state", (2, 4, 6, 6), "initial_state is"),
        ("initial_state", (1, 2, 6, 6), "initial_state is"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(form, name: str, shape: tuple[int, ...], message: str) -> None:
    if form is gated_linear_attention_step and shape == (2, 1, 4):
        message = "four dimensions .* got 4, 5, 5 and 5"
    with pytest.raises(ValueError, match=message):
        call(form, zeros(**{name: shape}))


@pytest.mark.parametrize("form", FORMS)
def test_no_heads(form) -> None:
    shapes = {"k": (2, 1, 0, 6), "v": (2, 1, 0, 5), "log_decay": (2, 1, 0, 6), "initial_state": (2, 0, 6, 6)}
    with pytest.raises(ValueError, match="multiple of the 0 of k"):
        call(form, zeros(**shapes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_without_arithmetic(form, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"log_decay is {dtype}; it must be one of torch.bfloat16, "):
        call(form, zeros() | {"log_decay": torch.zeros(SHAPES["log_decay"]).to(dtype)})


@pytest.mark.parametrize("form", FORMS)
def test_two_devices(form) -> None:
    tensors = zeros()
    tensors["v"] = tensors["v"].to("meta")
    with pytest.raises(ValueError, match="different devices: cpu, meta; move them to one"):
        call(form, tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [0.0, -1e-6])
def test_eps_must_be_above_0(form, eps: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        call(form, zeros(), eps=eps)


@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("value", [1e-6, 3.0, torch.inf])
def test_a_decay_that_grows(form, value: float) -> None:
    tensors = zeros()
    tensors["log_decay"][1, 0, 1, 3] = value
    with pytest.raises(ValueError, match=r"log_decay holds .* at most 0"):
        call(form, tensors)


def test_a_step_takes_one_token() -> None:
    shapes = {name: (2, 3, *SHAPES[name][2:]) for name in ("q", "k", "v", "log_decay")}
    with pytest.raises(ValueError, match="q has 3 tokens; a step takes one"):
        call(gated_linear_attention_step, zeros(**shapes))


def test_a_step_without_token_dimension() -> None:
    tensors = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    tensors["log_decay"] = -tensors["log_decay"]
    expected, expected_state = call(gated_linear_attention_step, tensors)
    squeezed = {name: t if name == "initial_state" else t.squeeze(1) for name, t in tensors.items()}
    output, state = call(gated_linear_attention_step, squeezed)
    assert output.shape == (2, 4, 5)
    assert torch.equal(output, expected[:, 0])
    assert torch.equal(state, expected_state)


def test_a_step_of_one_decay_a_head() -> None:
    tensors = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    tensors["log_decay"] = -tensors["log_decay"][..., :1]
    output, state = call(gated_linear_attention_step, tensors)
    wide = tensors | {"log_decay": tensors["log_decay"].expand(SHAPES["k"])}
    expected, expected_state = call(gated_linear_attention_step, wide)
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)
