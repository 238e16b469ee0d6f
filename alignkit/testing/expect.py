"""Helpers of the checks: failures in one line, comparisons, and state that code under test must not change."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.errors import AlignkitError, PluginError


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `holds`."""
    if not holds:
        raise AssertionError(message)


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Turn every failure inside into an AssertionError of one line that begins with `what`.

    An AlignkitError other than PluginError is raised as it is: the user has to set or install something.
    """
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {_line(error)}") from error
    except PluginError as error:
        raise AssertionError(f"{what}: {_line(error)}") from error
    except AlignkitError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: raised {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def global_rng_untouched(when: str) -> Iterator[None]:
    """Raise AssertionError if a global random generator of Python, NumPy or torch moves, or something is printed."""
    before, printed = _generators(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for name, state in _generators().items():
        expect(state == before[name], f"{when} the global random generator of {name} was used; use ctx.generator")
    expect(not printed.getvalue(), f"{when} it printed {printed.getvalue()[:60]!r}; metrics go through ctx.log")


def _generators() -> dict[str, bytes]:
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "NumPy": numpy_state[1].tobytes() + str(numpy_state[2:]).encode(),
        "Python": repr(random.getstate()).encode(),
    }


def same(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Raise AssertionError, with the largest difference, unless both agree within atol + rtol * max |expected|."""
    expect(found.shape == expected.shape, f"{what}: found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    scale = float(expected.detach().abs().nan_to_num().max()) if expected.numel() else 0.0
    difference = (found.detach().double() - expected.detach().double()).abs()
    alike = difference.isnan() & found.isnan() & expected.isnan()
    worst = float(difference.masked_fill(alike, 0).max()) if found.numel() else 0.0
    expect(worst <= atol + rtol * scale, f"{what}: found a difference of {worst:.3g}, expected none beyond rounding")


def all_finite(values: Tensor, what: str) -> None:
    """Raise AssertionError with the first value that is not finite."""
    wrong = values.detach()[~values.detach().isfinite()]
    expect(not len(wrong), f"{what}: found {float(wrong.flatten()[0]) if len(wrong) else 0}, expected finite numbers")


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Return every leaf of a nested state by its path; tensors as dtype, shape and bytes."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {k: v for key, item in items for k, v in leaves(item, f"{where}.{key}").items()}
    if isinstance(value, Tensor):
        return {where: (str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes())}
    return {where: value}


def differences(found: Any, expected: Any) -> list[str]:
    """Return the paths at which two nested states differ, without values: a diff of tensors takes minutes to print."""
    one, other = leaves(found), leaves(expected)
    return sorted(name for name in one.keys() | other.keys() if one.get(name, ...) != other.get(name, ...))
