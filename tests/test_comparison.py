"""The tests' own comparison names the worst entry."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_near


def test_the_worst_entry_is_named() -> None:
    expected = torch.zeros(3, 4)
    expected[0, 0] = 2.0
    actual = expected.clone()
    actual[1, 2], actual[2, 3] = 0.1, -0.4
    assert_near(actual, expected, 0.21)
    with pytest.raises(AssertionError, match=r"state at \(2, 3\): -0.4.*, expected 0; 0.2 of the scale 2"):
        assert_near(actual, expected, 0.1, "state")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_fails(value: float) -> None:
    with pytest.raises(AssertionError, match=r"at \(1,\)"):
        assert_near(torch.tensor([0.0, value]), torch.zeros(2), 1e9)


def test_another_shape_fails() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_near(torch.zeros(2, 1), torch.zeros(2), 1.0)
