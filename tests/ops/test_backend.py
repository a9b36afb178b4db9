"""Which implementation runs: an argument wins over a context, that over the environment."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import threading
from collections import Counter

import pytest
import torch

from lawcat.errors import BackendError
from lawcat.ops import backend, backend_names, choose_backend, explain, gated_linear_attention, use_backend
from lawcat.ops.triton import support
from small_models import make_model


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations that calls have run, in order."""
    names: list[str] = []
    for name in ("reference", "chunked"):
        function = getattr(backend, f"gated_linear_attention_{name}")

        def recorded(*args: object, name: str = name, function=function, **options: object):
            names.append(name)
            return function(*args, **options)

        monkeypatch.setattr(backend, f"gated_linear_attention_{name}", recorded)
    return names


def call(**options: object) -> None:
    x = torch.rand(1, 3, 1, 2)
    gated_linear_attention(x, x, x, -x, **options)


def test_the_default(ran: list[str]) -> None:
    call()
    call(backend="torch")
    call(backend="reference")
    assert ran == ["chunked", "chunked", "reference"]
    assert choose_backend() == "torch"


def test_argument_over_context_over_environment(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_BACKEND", "reference")
    call()
    with use_backend("torch"):
        call()
        call(backend="reference")
        with use_backend("reference"):
            call()
        call()
    call()
    monkeypatch.setenv("LAWCAT_BACKEND", "")
    call()
    assert ran == ["reference", "chunked", "reference", "reference", "chunked", "reference", "chunked"]


def test_a_context_ends_with_an_error_too() -> None:
    with contextlib.suppress(RuntimeError), use_backend("reference"):
        assert choose_backend() == "reference"
        raise RuntimeError
    assert choose_backend() == "torch"


def test_a_context_is_of_the_process() -> None:
    """Of all threads, those started before it too: autograd's are."""
    asked, answered = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    seen: list[str] = []

    def look() -> None:
        for _ in range(2):
            asked.wait()
            seen.append(choose_backend())
            answered.wait()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    with use_backend("reference"):
        asked.wait()
        answered.wait()
    asked.wait()
    answered.wait()
    thread.join()
    assert seen == ["reference", "torch"]


def test_unknown_names_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BackendError, match=r"backend='tritn' does not exist; use one of auto, torch, reference"
    ):
        call(backend="tritn")
    with (
        pytest.raises(BackendError, match=r"use_backend='referense' .* Did you mean 'reference'\?"),
        use_backend("referense"),
    ):
        pass
    monkeypatch.setenv("LAWCAT_BACKEND", "cuda")
    with pytest.raises(BackendError, match="LAWCAT_BACKEND='cuda' does not exist"):
        call()
    with pytest.raises(BackendError, match="LAWCAT_BACKEND"):
        explain()
    assert issubclass(BackendError, ValueError)


def test_explain_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_calls", Counter())
    monkeypatch.setattr(backend, "_fallbacks", {})
    for name in ("torch", "torch", "reference"):
        call(backend=name)
    assert explain().splitlines()[-2:] == [
        "ran: recurrence by reference, 1 call",
        "ran: recurrence by torch, 2 calls",
    ]
    model = make_model()
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        model(torch.tensor([[4]]), past_key_values=cache)
    layers = len(model.attention_modules())
    assert f"ran: recurrence by torch, {2 + layers} calls" in explain()
    assert f"ran: step by torch, {layers} calls" in explain()


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_calls", Counter())
    monkeypatch.setattr(backend, "_fallbacks", {})
    lines = explain().splitlines()
    assert [line.split(":")[0] for line in lines] == list(backend_names()[1:])
    assert "taken by 'auto'" in lines[0]
    assert "taken" not in lines[1]
    monkeypatch.setenv("LAWCAT_BACKEND", "reference")
    assert explain().splitlines()[-1] == "'auto' means 'reference' because of LAWCAT_BACKEND"
    with use_backend("torch"):
        assert explain().splitlines()[-1] == "'auto' means 'torch' because of use_backend"
    with use_backend("auto"):
        assert explain().splitlines()[-1] == "'auto' means 'reference' because of LAWCAT_BACKEND"


def test_explain_says_why_one_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = backend.Backend("absent", "not there", lambda: "no such device")
    monkeypatch.setattr(backend, "_BACKENDS", (*backend._BACKENDS, absent))
    assert "absent: not there (not available: no such device)" in explain()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.5.1", "triton is 3.5.1; 3.6 or newer is needed"),
        (None, "the package triton is not installed (it comes with PyTorch for CUDA)"),
    ],
)
def test_a_gpu_without_a_triton_of_today(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """ "auto" takes PyTorch and says so once; who asks for the kernels is told what is needed."""

    def installed(package: str) -> str:
        assert package == "triton"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    support.missing()  # kept, as ``explain`` asks the original: it must not keep what is put here
    monkeypatch.setattr(support.importlib.metadata, "version", installed)
    monkeypatch.setattr(support, "missing", support.missing.__wrapped__)
    monkeypatch.setattr(backend, "_fallbacks", {})
    assert [choose_backend("auto", "cuda") for _ in range(2)] == ["torch", "torch"]
    assert [str(w.message) for w in recwarn] == [f"lawcat's kernels are not used: {reason}."]
    assert f"fell back to torch: {reason}" in explain()
    x = torch.rand(1, 3, 1, 2)
    with pytest.raises(BackendError, match=re.escape(f"backend='triton' cannot run: {reason}")):
        gated_linear_attention(x, x, x, -x, backend="triton")
    with use_backend("torch"):
        choose_backend("auto", "cuda")
    choose_backend("auto", "cpu")
    assert len(recwarn) == 1, "asked for, and on a CPU, it is nothing to warn of"


def test_a_gpu_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tensors are on a GPU is all that is needed to know it."""
    monkeypatch.setattr(support, "missing", lambda: None)
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    monkeypatch.setattr(support, "too_old", support.too_old.__wrapped__)
    found = []
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found.append(support._cannot_run_on(torch.device("cuda", 0)))
    assert found == ["the GPU's compute capability is 7.5; 8.0 or newer is needed", None, None]
    assert support._cannot_run_on(torch.device("cpu")) == "the tensors are on cpu; the kernels run on cuda"
