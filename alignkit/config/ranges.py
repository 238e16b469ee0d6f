"""Ranges of fields, written as annotations (`Annotated[int, Ge(1)]`): as checks, and in words."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from annotated_types import (
    BaseMetadata,
    Ge,
    GroupedMetadata,
    Gt,
    IsFinite,
    Le,
    Lt,
    MaxLen,
    MinLen,
    MultipleOf,
    Predicate,
)

Positive = IsFinite[Annotated[float, Gt(0)]]
NotNegative = IsFinite[Annotated[float, Ge(0)]]


def split(hint: Any) -> tuple[Any, list[Any]]:
    """Return a type without its annotations, and these as single constraints."""
    if typing.get_origin(hint) is not Annotated:
        return hint, []
    base, *metadata = typing.get_args(hint)
    return base, list(_single(metadata))


def _single(metadata: Iterable[Any]) -> Iterator[Any]:
    for one in metadata:
        # The first test is about the second as well, and far faster: the second class is a protocol.
        single = isinstance(one, BaseMetadata) or not isinstance(one, GroupedMetadata)
        yield from [one] if single else _single(one)


def holds(constraint: Any, value: Any) -> bool:
    """Whether `value` meets one constraint; an annotation that is no constraint is met by everything."""
    match constraint:
        case Ge(ge=bound):
            return bool(value >= bound)
        case Gt(gt=bound):
            return bool(value > bound)
        case Le(le=bound):
            return bool(value <= bound)
        case Lt(lt=bound):
            return bool(value < bound)
        case MultipleOf(multiple_of=bound):
            return bool(value % bound == 0)
        case MinLen(min_length=bound):
            return len(value) >= bound
        case MaxLen(max_length=bound):
            return len(value) <= bound
        case Predicate(func=test):
            return bool(test(value))
    return True


def words(constraints: Sequence[Any]) -> str:
    """Return constraints in words: "1 or more", "at least 0 and less than 1". That a number is finite is left out."""
    return ", ".join(filter(None, [_interval(constraints), *map(_word, constraints)]))


def _interval(constraints: Sequence[Any]) -> str:
    low = high = ""
    closed = False
    for constraint in constraints:
        match constraint:
            case Ge(ge=bound):
                low, closed = f"at least {bound}", True
            case Gt(gt=bound):
                low = f"more than {bound}"
            case Le(le=bound):
                high = f"at most {bound}"
            case Lt(lt=bound):
                high = f"less than {bound}"
    if closed and not high:
        return f"{low.removeprefix('at least ')} or more"
    return " and ".join(filter(None, [low, high]))


def _word(constraint: Any) -> str:
    match constraint:
        case MultipleOf(multiple_of=bound):
            return f"a multiple of {bound}"
        case MinLen(min_length=1):
            return "not empty"
        case MinLen(min_length=bound):
            return f"{bound} or more entries"
        case MaxLen(max_length=bound):
            return f"at most {bound} entries"
        case Predicate(func=test) if test is not math.isfinite:
            return f"a value for which {getattr(test, '__name__', test)} is true"
    return ""
