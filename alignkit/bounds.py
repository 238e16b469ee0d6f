"""What a number of a section may be: each as (found, whether it is fine, what was expected)."""

from __future__ import annotations

import math
from typing import Any


def require(**demands: tuple[Any, bool, str]) -> None:
    """Raise ValueError with one line for each `name=(found, whether it is fine, what was expected)` that is not."""
    wrong = [f"{name}: found {found}, expected {text}" for name, (found, fine, text) in demands.items() if not fine]
    if wrong:
        raise ValueError(*wrong)


def or_more(value: float, bound: int) -> tuple[float, bool, str]:
    return value, bound <= value < math.inf, f"{bound} or more" + ", and finite" * (value == math.inf)


def above_zero(value: float) -> tuple[float, bool, str]:
    return value, 0 < value < math.inf, "more than 0" + ", and finite" * (value == math.inf)


def finite(value: Any) -> tuple[Any, bool, str]:
    return value, not isinstance(value, float) or math.isfinite(value), "a finite number"
