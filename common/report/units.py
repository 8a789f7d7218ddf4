"""Formats numbers for people."""

import math

from common.analysis.interval import Interval
from common.report.results import ArmResult


def si(number: float) -> str:
    """Formats with three significant digits and an SI prefix.

    >>> si(2_310_456), si(950), si(12_345), si(0), si(999_960)
    ('2.31 M', '950', '12.3 k', '0', '1.00 M')
    """
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.3g}"


def scientific(number: float, digits: int = 3) -> str:
    """Formats with `digits` significant digits and a power of ten, without plus sign or leading zeros in the exponent.

    >>> scientific(4.1234e14), scientific(0.0), scientific(2e13, 1)
    ('4.12e14', '0', '2e13')
    """
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float, digits: int = 1) -> str:
    """
    >>> percent(0.9654), percent(-0.0003, 2)
    ('96.5 %', '−0.03 %')
    """
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def percent_interval(share: Interval) -> str:
    """
    >>> percent_interval(Interval(value=0.965, low=0.9595, high=0.97))
    '96.5 % [96.0, 97.0]'
    """
    return f"{percent(share.value)} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def p_text(p_value: float) -> str:
    """
    >>> p_text(0.0213), p_text(1e-6)
    ('p = 0.021', 'p < 0.0001')
    """
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def fill(result: ArmResult) -> str:
    """Formats the fill of input slots, if rows have any, and of target slots."""
    inputs = "no slots" if result.input_fill is None else percent(result.input_fill)
    return f"{inputs} / {percent(result.target_fill)}"


def duration(seconds: float) -> str:
    """
    >>> duration(12.34), duration(192.0), duration(8000.0)
    ('12.3 s', '3 min 12 s', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
