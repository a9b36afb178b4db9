"""The decoding kernel in Triton's interpreter, against a step of the model's own modules in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comparison import assert_near
from kernel_device import DEVICE
from lawcat.errors import BackendError
from lawcat.model.convolution import CausalConvolution
from lawcat.model.feature_map import FeatureMap
from lawcat.model.gate import DecayGate
from lawcat.ops import gated_linear_attention_reference
from lawcat.ops.triton.decode_step import decode_step, unavailable_because

HIDDEN = 8


@dataclass(frozen=True)
class Case:
    """Sizes and variants; the fields' names are those of the kernel's legend."""

    H: int = 4
    G: int = 2
    N: int = 4
    D: int = 16
    F: int = 16
    K: int | None = 4
    gate: str = "channel"
    normalize: bool = True
    B: int = 1
    bias: float = 4.0
    divisor: float = 16.0


class Layer:
    """A layer's modules in float64, the state it carries, and the same in what the kernel takes."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.q_conv = self.k_conv = None
        if case.K is not None:
            self.q_conv = CausalConvolution(case.H, case.D, case.K)
            self.k_conv = CausalConvolution(case.N, case.D, case.K)
        self.feature_map = FeatureMap(case.N, case.D, case.F)
        width = {"channel": case.F, "head": 1, "none": 1}[case.gate]
        self.gate = DecayGate(HIDDEN, case.G, width, 3, case.divisor, -2.5, "zeros")
        for module in (self.q_conv, self.k_conv, self.feature_map, self.gate):
            if module is not None:
                module.double().requires_grad_(False)
                for parameter in module.parameters():
                    # Rounded to float32, so that both sides compute with the same numbers.
                    noisy = parameter + 0.5 * self.random(*parameter.shape)
                    parameter.copy_(noisy.float().double())
        self.gate.bias.add_(case.bias)
        features = self.random(case.B, case.N, case.F, 3).abs()
        values = torch.cat([self.random(case.B, case.N, 3, case.D), torch.ones(case.B, case.N, 3, 1)], -1)
        self.state = (features @ values).float().double()
        self.q_inputs = self.k_inputs = None
        if case.K is not None:
            self.q_inputs = self.random(case.B, case.H * case.D, case.K - 1).to(dtype).double()
            self.k_inputs = self.random(case.B, case.N * case.D, case.K - 1).to(dtype).double()
        self.kept = {
            name: None if tensor is None else tensor.to(kept).to(DEVICE)
            for name, tensor, kept in (
                ("state", self.state, torch.float32),
                ("q_inputs", self.q_inputs, dtype),
                ("k_inputs", self.k_inputs, dtype),
            )
        }

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v of one token and what the gate reads, in float64 with values that the dtype holds."""
        case = self.case
        q, k, v = (self.random(case.B, 1, heads, case.D) for heads in (case.H, case.G, case.G))
        q, k, v = (t.to(self.dtype).double() for t in (q, k, v))
        return q, k, v, self.random(case.B, 1, HIDDEN)

    def logits(self, x: Tensor) -> Tensor | None:
        gate, case = self.gate, self.case
        if case.gate == "none":
            return None
        found = F.linear(F.linear(x, gate.reduce), gate.expand, gate.bias)
        return found.view(case.B, 1, case.G, -1)

    def step_by_modules(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """One token in float64."""
        case = self.case
        decay = torch.zeros(case.B, 1, case.G, 1)
        if case.gate != "none":
            decay = self.gate.log_decay(self.gate(x))
        repeats = case.N // case.G
        k, v, decay = (t.repeat_interleave(repeats, dim=2) for t in (k, v, decay))
        if self.q_conv is not None and self.k_conv is not None:
            q, self.q_inputs = self.q_conv(q, self.q_inputs)
            k, self.k_inputs = self.k_conv(k, self.k_inputs)
        output, self.state = gated_linear_attention_reference(
            self.feature_map(q),
            self.feature_map(k),
            v,
            decay,
            initial_state=self.state,
            normalize=case.normalize,
        )
        return output

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Tensor | None]:
        """What the kernel is called with; the state is its own."""
        logits = self.logits(x)
        given = {"q": q.to(self.dtype), "k": k.to(self.dtype), "v": v.to(self.dtype)}
        given["gate_logits"] = None if logits is None else logits.float()
        given["q_conv"] = None if self.q_conv is None else self.q_conv.weight.float()
        given["k_conv"] = None if self.k_conv is None else self.k_conv.weight.float()
        given["feature_weight"] = self.feature_map.weight.float()
        return {name: None if t is None else t.to(DEVICE) for name, t in given.items()} | self.kept

    def compare(self, tokens: int = 2, tolerance: float = 2e-6) -> None:
        """Run both for a few tokens; outputs and what is kept must agree after each."""
        for token in range(tokens):
            given = self.projections()
            expected = self.step_by_modules(*given)
            arguments = self.arguments(*given)
            poisoned = torch.full_like(expected, torch.nan, dtype=self.dtype, device=DEVICE)
            actual = decode_step(
                **arguments,
                gate_divisor=self.case.divisor,
                normalize=self.case.normalize,
                out=poisoned,
            )
            assert actual.dtype == self.dtype
            # The interpreter cuts bfloat16 off where a GPU rounds.
            rounding = {torch.float32: 0.0, torch.bfloat16: 8e-3, torch.float16: 5e-4}[self.dtype]
            where = f"after token {token + 1}"
            assert_near(actual.cpu(), expected, tolerance + rounding, f"output {where}")
            assert_near(arguments["state"].cpu(), self.state, tolerance, f"state {where}")
            for name in ("q_inputs", "k_inputs"):
                if arguments[name] is not None:
                    assert torch.equal(arguments[name].cpu().double(), getattr(self, name)), f"{name} {where}"


@pytest.mark.parametrize(
    "case",
    [
        Case(B=3),
        Case(H=4, G=4),
        Case(H=4, G=1),
        Case(H=4, G=2, N=2, B=2),
        Case(H=8, G=1, N=1),
        Case(H=6, G=2, N=2),
        Case(H=9, G=3, N=9, D=32, F=32),
        Case(K=2),
        Case(K=3),
        Case(K=5, G=2, N=2),
        Case(K=None),
        Case(D=5, F=6),
        Case(D=33, F=24, N=2),
        Case(D=24, F=48),
        Case(gate="head"),
        Case(gate="none"),
        Case(gate="head", N=2, K=None),
        Case(normalize=False),
    ],
    ids=str,
)
def test_output_state_and_inputs(case: Case) -> None:
    Layer(case).compare()


@pytest.mark.parametrize(
    "case",
    [
        Case(bias=-60.0, divisor=1.0),  # at the bound
        Case(bias=-30.0),
        Case(bias=30.0),  # no decay left in float32
        Case(bias=12.0),
    ],
    ids=str,
)
def test_strong_and_vanishing_decay(case: Case) -> None:
    Layer(case).compare(tokens=4)


@pytest.mark.parametrize("case", [Case(H=2, G=1, N=2, D=128, F=128), Case(H=4, G=1, N=1, D=64, F=128)])
def test_several_tiles(case: Case) -> None:
    Layer(case).compare(tokens=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    Layer(Case(D=10, F=12), dtype).compare(tokens=3)


def test_a_state_of_zeros_gives_the_value() -> None:
    layer = Layer(Case())
    for kept in layer.kept.values():
        kept.zero_()
    arguments = layer.arguments(*layer.projections())
    output = decode_step(**arguments)
    group = layer.case.H // layer.case.G
    assert_near(output.cpu(), arguments["v"].cpu().repeat_interleave(group, dim=2), 1e-4, "output")


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_nan_shows(gate: str) -> None:
    """A NaN in a gate, which its bound must not hide, reaches its heads' outputs and state; no other's."""
    layer = Layer(Case(H=4, G=2, gate=gate))
    arguments = layer.arguments(*layer.projections())
    assert arguments["gate_logits"] is not None
    arguments["gate_logits"][0, 0, 0, -1] = torch.nan
    output = decode_step(**arguments)
    assert output[0, 0, :2].isnan().all()
    assert output[0, 0, 2:].isfinite().all()
    assert arguments["state"][0, :2].isnan().any()
    assert arguments["state"][0, 2:].isfinite().all()


def test_projections_of_one_matrix_product() -> None:
    """q, k and v as slices of one tensor, whose rows are longer than they are."""
    layer = Layer(Case(B=2))
    q, k, v, x = layer.projections()
    case = layer.case
    fused = torch.cat([t.flatten(2) for t in (q, k, v)], -1).float().to(DEVICE)
    sizes = [case.H * case.D, case.G * case.D, case.G * case.D]
    slices = [t.unflatten(-1, (-1, case.D)) for t in fused.split(sizes, -1)]
    arguments = layer.arguments(q, k, v, x) | dict(zip("qkv", slices, strict=True))
    assert not arguments["k"].is_contiguous()
    assert_near(decode_step(**arguments).cpu(), layer.step_by_modules(q, k, v, x), 2e-6, "output")


def test_without_a_token_dimension_and_for_no_sequences() -> None:
    layer = Layer(Case(B=2))
    given = layer.projections()
    arguments = layer.arguments(*given)
    flat = {name: arguments[name][:, 0] for name in ("q", "k", "v", "gate_logits")}
    assert decode_step(**arguments | flat).shape == (2, 4, 16)
    kept = ("q", "k", "v", "gate_logits", "state", "q_inputs", "k_inputs")
    assert decode_step(**arguments | {name: arguments[name][:0] for name in kept}).shape == (0, 1, 4, 16)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": lambda t: t[..., :-1]}, ValueError, r"k is \(2, 2, 16\); with q \(2, 4, 15\)"),
        ({"q": lambda t: t.repeat(1, 3, 1, 1)}, ValueError, "a step takes one token"),
        ({"k": lambda t: t.repeat(1, 1, 2, 1)[:, :, :3]}, ValueError, "q has 4 heads, k 3"),
        ({"q_conv": lambda t: None}, ValueError, "give all of q_inputs"),
        ({"state": lambda t: t[:, :, :15]}, ValueError, "state has 15 features"),
        ({"feature_weight": lambda t: t[:2]}, ValueError, "feature_weight is"),
        ({"state": lambda t: t.to(torch.bfloat16)}, BackendError, "the kernel keeps it in float32"),
        ({"v": lambda t: t.double()}, BackendError, "v: the kernel takes float32, bfloat16, float16, not"),
        (
            {"state": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)},
            BackendError,
            "must be contiguous",
        ),
        ({"q": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)}, BackendError, "last dimension"),
        ({"q": lambda t: t.requires_grad_()}, BackendError, "requires a gradient"),
        ({"v": lambda t: t.to("meta")}, ValueError, "v is on meta and q on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict, error: type[Exception], says: str
) -> None:
    layer = Layer(Case(B=2))
    arguments = layer.arguments(*layer.projections())
    before = arguments["state"].clone()
    ((name, function),) = change.items()
    with pytest.raises(error, match=says):
        decode_step(**arguments | {name: function(arguments[name])})
    assert torch.equal(arguments["state"], before)


def test_gradients_may_be_off() -> None:
    layer = Layer(Case())
    arguments = layer.arguments(*layer.projections())
    with torch.no_grad():
        decode_step(**arguments | {"q": arguments["q"].requires_grad_()})


def test_why_it_cannot_run() -> None:
    cuda, sizes = torch.device("cuda"), {"head_dim": 64, "feature_dim": 64}
    assert unavailable_because(cuda, torch.bfloat16, **sizes) is None
    assert "not float64" in unavailable_because(cuda, torch.float64, **sizes)
    too_wide = unavailable_because(cuda, torch.bfloat16, head_dim=512, feature_dim=64)
    assert "widths up to 256; head_dim is 512" in too_wide


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 3, 256])
def test_replays_of_a_graph_go_on_from_the_state(batch: int) -> None:
    layer = Layer(Case(H=8, G=2, N=8, D=64, F=64, B=batch), torch.bfloat16)
    first = layer.arguments(*layer.projections())
    kept = {name: first[name].clone() for name in ("state", "q_inputs", "k_inputs")}
    decode_step(**first | {name: tensor.clone() for name, tensor in kept.items()})  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_step(**first)
    for name, tensor in kept.items():
        first[name].copy_(tensor)
    for _ in range(3):
        given = layer.projections()
        for name, tensor in layer.arguments(*given).items():
            if name in ("q", "k", "v", "gate_logits"):
                first[name].copy_(tensor)
        expected = layer.step_by_modules(*given)
        graph.replay()
        assert_near(output.cpu(), expected, 5e-3, "output")
    assert_near(first["state"].cpu(), layer.state, 1e-5, "state")
