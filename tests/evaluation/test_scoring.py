import pytest
from hypothesis import given
from hypothesis import strategies as st

from lawcat.errors import ConfigurationError
from lawcat.evaluation.lengths import format_length, parse_length, parse_lengths
from lawcat.evaluation.scoring import Z_95, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27753280),
        (8, 10, 0.49016247, 0.94331785),
        (10, 10, 0.72246720, 1.0),
        (20, 20, 0.83887484, 1.0),
        (49, 50, 0.89504556, 0.99646074),
        (0.5, 1, 0.05462076, 0.94537924),
    ],
)
def test_wilson_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-8)
    # Where the interval comes from: the shares that the observed one is z standard errors away from.
    observed = successes / trials
    for share in (low, high):
        if 0 < share < 1:
            error = (share * (1 - share) / trials) ** 0.5
            assert abs(observed - share) == pytest.approx(Z_95 * error, abs=1e-7)


@given(trials=st.integers(1, 1000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_inside(trials, share):
    low, high = wilson_interval(share * trials, trials)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 10), (11, 10)])
def test_wilson_refuses_what_cannot_be(successes, trials):
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1024", 1024),
        (1024, 1024),
        ("1k", 1024),
        ("8K", 8192),
        (" 16k ", 16384),
        ("1.5k", 1536),
        ("1_000", 1000),
    ],
)
def test_lengths_as_people_write_them(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "8m", "-1", "0", "1.3", "1,5k", "8 kb", None, True, 2.5, "1k 2k"])
def test_no_lengths(text):
    with pytest.raises(ConfigurationError, match="is not a length"):
        parse_length(text)


def test_length_zero_only_where_it_may_be():
    assert [parse_length(text, least=0) for text in ("0", "0k", "0K", 0)] == [0] * 4
    assert parse_lengths("0k,1k", least=0) == [0, 1024]
    with pytest.raises(ConfigurationError, match="'-1' is not a length"):
        parse_length("-1", least=0)


@pytest.mark.parametrize(
    ("text", "meant"), [("8kb", "8k"), ("8 kilo", "8k"), ("16 K tokens", "16k"), ("1m", "1024k")]
)
def test_units_that_are_nearly_right(text, meant):
    with pytest.raises(ConfigurationError, match=f"Did you mean '{meant}'"):
        parse_length(text)


def test_lists_of_lengths():
    assert parse_lengths("1024, 2k,1k,") == [1024, 2048]
    with pytest.raises(ConfigurationError, match="holds no length"):
        parse_lengths(" , ")
    with pytest.raises(ConfigurationError, match="'2x' is not a length"):
        parse_lengths("1k,2x")
    assert [format_length(tokens) for tokens in (512, 1024, 16384, 22000)] == ["512", "1K", "16K", "22000"]
