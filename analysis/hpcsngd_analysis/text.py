"""How numbers are written for people. A missing value is a dash; NaN was measured and stays ``nan``."""

from __future__ import annotations

import math

from hpcsngd_analysis.tables import NOT_SET

_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))


def share(value: float | None) -> str:
    """Returns a share as per cent with two digits: 0.97222 is ``97.22 %``, with a no-break space."""
    return NOT_SET if value is None else "nan" if math.isnan(value) else f"{100 * value:.2f}\u00a0%"


def number(value: float | None) -> str:
    """Returns a number with four significant digits."""
    return NOT_SET if value is None else f"{value:.4g}"


def whole(value: int | None) -> str:
    """Returns a whole number with thousands separated: 10000 is ``10,000``."""
    return NOT_SET if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """Returns a time: ``12.3 s``, ``4 min 05 s`` or ``3 h 07 min``, rounded half to even."""
    if value is None:
        return NOT_SET
    if not math.isfinite(value):
        return str(value)
    if value < 59.95:
        return f"{value:.1f} s"
    if value < 3599.5:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(value / 60), 60)
    return f"{hours:,} h {rest:02d} min"


def size(value: float | None) -> str:
    """Returns a number of bytes with a binary unit: 1536 is ``1.5 KiB``."""
    if value is None:
        return NOT_SET
    word, unit = next(((word, unit) for word, unit in _BYTES if abs(value) >= unit), ("B", 1.0))
    return f"{value / unit:,.4g}\u00a0{word}"


def hours(value: float | None) -> str:
    """Returns node-hours with three significant digits, and thousands separated from 100 on."""
    return NOT_SET if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
