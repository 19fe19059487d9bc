"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from hpcsngd_analysis import text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (11_220.0, "3 h 07 min"),
        (7_200_000.0, "2,000 h 00 min"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (None, "–"),
    ],
)
def test_seconds(value: float | None, words: str) -> None:
    assert text.seconds(value) == words


def test_shares_numbers_and_counts() -> None:
    assert [text.share(value) for value in (0.97222, 1.0, math.nan, None)] == [
        "97.22\u00a0%",
        "100.00\u00a0%",
        "nan",
        "–",
    ]
    assert [text.number(value) for value in (0.123456, 3.0, 12345.6, math.nan, None)] == [
        "0.1235",
        "3",
        "1.235e+04",
        "nan",
        "–",
    ]
    assert [text.whole(value) for value in (0, 10_000, None)] == ["0", "10,000", "–"]
