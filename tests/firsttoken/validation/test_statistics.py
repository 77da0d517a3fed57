"""Statistics of errors against values by hand and closed forms."""

import math

import pytest

from firsttoken.validation.statistics import Pair, rank_correlation, share, summaries, summary


def pair(measured: float, predicted: float, chip: str = "a", quantity: str = "ttft_ms", counted: bool = True) -> Pair:
    return Pair(chip, quantity, "m", measured, predicted, counted)


def test_errors_of_four_pairs() -> None:
    found = summary([pair(100, 110), pair(100, 95), pair(100, 130), pair(200, 200)], "a", "prefill")
    assert found.mape == pytest.approx((10 + 5 + 30 + 0) / 4)
    assert found.median == pytest.approx(7.5)
    assert found.mean == pytest.approx((10 - 5 + 30) / 4)
    assert found.worst == pytest.approx(30)
    assert (found.n, found.within_20) == (4, 75.0)


def test_the_mean_is_above_0_where_predictions_are_too_slow() -> None:
    assert pair(100, 80, quantity="decode_tok_s").slowness == pytest.approx(0.25)
    assert pair(100, 125).slowness == pytest.approx(0.25)


def test_shares_count_the_limit_itself() -> None:
    assert share([10.0, 10.1, 20.0, 0.0], 10.0) == 50.0


@pytest.mark.parametrize("n", [3, 5, 8])
def test_rank_correlation_is_that_of_the_ranks(n: int) -> None:
    first = [float(2**i) for i in range(n)]
    assert rank_correlation(first, [math.log(x) for x in first]) == pytest.approx(1)
    assert rank_correlation(first, first[::-1]) == pytest.approx(-1)
    swapped = [first[1], first[0], *first[2:]]
    assert rank_correlation(first, swapped) == pytest.approx(1 - 6 * 2 / (n * (n * n - 1)))


def test_no_rank_without_three_values_or_without_order() -> None:
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None


def test_lines_by_chip_and_kind_and_over_all() -> None:
    found = summaries(
        [
            pair(100, 110), pair(10, 12, quantity="decode_tok_s"), pair(5, 500, quantity="power_w"),
            pair(100, 90, chip="b"), pair(1, 9, chip="b", counted=False),
        ],
        {"b": 12.5},
    )  # fmt: skip
    lines = {(s.chip, s.kind): s for s in found}
    assert list(lines) == [
        ("a", "prefill"), ("a", "decode"), ("a", "power"), ("a", "all times"), ("b", "prefill"), ("b", "all times"),
        ("all", "prefill"), ("all", "decode"), ("all", "power"), ("all", "all times"),
    ]  # fmt: skip
    assert lines["a", "all times"].mape == pytest.approx(15)
    assert lines["b", "all times"].left_out == 12.5
    assert lines["a", "all times"].left_out is None
    assert lines["all", "all times"].n == 3


def test_nothing_counted_is_no_line() -> None:
    assert summaries([pair(1, 2, counted=False)]) == ()
