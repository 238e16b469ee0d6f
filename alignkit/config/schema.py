"""A dataclass as the schema of a section: the types, ranges and docs of its fields, and checks of values."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from annotated_types import Predicate

from alignkit.config import ranges
from alignkit.config.toml import format_value
from alignkit.errors import PluginError


@functools.cache
def field_types(cls: type) -> types.MappingProxyType[str, Any]:
    """Return the type of each field that can be set, with its annotations. A class that is no dataclass has none.

    Raises PluginError for an annotation that is not understood at run time (a name imported for type checkers only).
    """
    if not dataclasses.is_dataclass(cls):
        return types.MappingProxyType({})
    result = {}
    for field in (f for f in dataclasses.fields(cls) if f.init):
        owner = next(k for k in cls.__mro__ if field.name in inspect.get_annotations(k))
        holder = types.SimpleNamespace(__annotations__={field.name: field.type})
        try:
            hints = typing.get_type_hints(holder, globalns=vars(sys.modules[owner.__module__]), include_extras=True)
        except (NameError, TypeError) as error:
            what = f"{cls.__module__}.{cls.__name__}.{field.name}"
            raise PluginError(f"{what}: the annotation cannot be read: {error}") from error
        result[field.name] = hints[field.name]
    return types.MappingProxyType(result)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and its bases, each on one line."""
    docs: dict[str, str] = {}
    for klass in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(klass)))
        except (OSError, TypeError):  # built in, or defined where no source is kept
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, after in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match after:
                    case ast.Expr(ast.Constant(str(text))):
                        docs[statement.target.id] = " ".join(text.split())
    return docs


def defaults(cls: type) -> dict[str, Any]:
    """Return the default of each field that has one."""
    values = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.init and field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def describe(hint: Any) -> str:
    """Return a type and its range in the words of a run file: "integer, 1 or more", "list of number"."""
    bounds = _range_words(hint)
    return f"{_type_words(hint)}, {bounds}" if bounds else _type_words(hint)


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`: an integer may stand for a float, a list for a tuple, a string for a path.

    Raises TypeError for anything else, nan included, and ValueError for a value out of the range of its type; both say
    what was found and what was expected.
    """
    converted = _typed(value, hint)
    if expected := _expected(converted, hint):
        raise ValueError(f"found {format_value(value)}, expected {expected}")
    return converted


def check_ranges(config: Any) -> None:
    """Raise ValueError, with one line for each field of a dataclass whose value is out of its annotated range or is
    none of its `Literal` values.

    Run files are checked before an object is built; call this in `__post_init__` for objects that Python builds
    directly. As in run files, nan is no number.
    """
    cls: type = type(config)
    values = {name: (getattr(config, name), hint) for name, hint in field_types(cls).items()}
    wrong = [
        f"{name}: found {format_value(value)}, expected {expected}"
        for name, (value, hint) in values.items()
        if (expected := describe(hint) if _is_none_of(value, hint) else _expected(value, hint))
    ]
    if wrong:
        raise ValueError(*wrong)


def _type_words(hint: Any) -> str:
    base, _ = ranges.split(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        return " or ".join(format_value(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_words(a) for a in args if a is not type(None))
    if origin in (list, tuple) and args:
        inner = [_type_words(a) for a in args if a is not Ellipsis]
        return f"list of {inner[0]}" if origin is list or Ellipsis in args else f"list of {', '.join(inner)}"
    words = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "string", Any: "anything"}
    words |= {list: "list", tuple: "list", dict: "table"}
    return words.get(origin or base, getattr(base, "__name__", str(base)))


def _range_words(hint: Any) -> str:
    base, constraints = ranges.split(hint)
    args = typing.get_args(base)
    found = [ranges.words(constraints)]
    if typing.get_origin(base) in (Union, types.UnionType):
        found += map(_range_words, args)
    elif typing.get_origin(base) in (list, tuple):
        found += [f"each {words}" for words in dict.fromkeys(map(_range_words, args)) if words]
    return ", ".join(filter(None, found))


def _expected(value: Any, hint: Any) -> str:
    """Return what was expected of a value of the right type that is out of range; empty if it is in range."""
    base, constraints = ranges.split(hint)
    args = typing.get_args(base)
    if typing.get_origin(base) in (Union, types.UnionType):
        found = [_expected(value, option) for option in args if _fits(value, option)]
        return min(found, default="")
    if typing.get_origin(base) in (list, tuple) and isinstance(value, list | tuple):
        each = args[:1] * len(value) if typing.get_origin(base) is list or Ellipsis in args else args
        if any(_expected(item, one) for item, one in zip(value, each, strict=False)):
            return describe(hint)
    if not _fits(value, base) or all(ranges.holds(constraint, value) for constraint in constraints):
        return ""
    if not isinstance(value, int | float):
        return describe(hint)
    bounds = ranges.words(constraints) or "a finite number"
    finite = all(ranges.holds(c, value) for c in constraints if not isinstance(c, Predicate))
    return f"{bounds}, and finite" if finite and bounds != "a finite number" and abs(value) == math.inf else bounds


def _is_none_of(value: Any, hint: Any) -> bool:
    """Whether a value is none of those that its type lists, or nan where it takes none."""
    if isinstance(value, float) and math.isnan(value):
        return not _fits(value, hint)
    base, _ = ranges.split(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return any(_is_none_of(item, one) for item in value for one in args if one is not Ellipsis)
    options = args if origin in (Union, types.UnionType) else (base,)
    return any(typing.get_origin(ranges.split(one)[0]) is Literal for one in options) and not _fits(value, hint)


def _fits(value: Any, hint: Any) -> bool:
    try:
        _typed(value, hint)
    except TypeError:
        return False
    return True


def _typed(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, whatever its range; raises TypeError."""
    base, _ = ranges.split(hint)
    args = typing.get_args(base)
    base = typing.get_origin(base) or base
    if base is Any:
        return value
    if base is Literal:
        if any(type(value) is type(a) and value == a for a in args):
            return value
    elif base in (Union, types.UnionType):
        # An exact type before one that needs conversion: in `float | int` 3 stays an integer.
        for option in sorted(args, key=lambda a: type(value) is not ranges.split(a)[0]):
            if value is None and option is type(None):
                return None
            with contextlib.suppress(TypeError):
                return _typed(value, option)
    elif base in (list, tuple) and isinstance(value, list | tuple):
        each = args or (Any, ...)
        items = each[:1] * len(value) if base is list or Ellipsis in each else each
        with contextlib.suppress(TypeError):  # the message below shows the whole list
            if len(items) == len(value):
                return base(_typed(item, one) for item, one in zip(value, items, strict=True))
    elif base is dict and isinstance(value, dict):
        return {key: _typed(item, args[1] if args else Any) for key, item in value.items()}
    elif base in (float, int) and isinstance(value, int | float) and not isinstance(value, bool):
        if value == value and (base is float or isinstance(value, int)):  # nan is no number
            return base(value)
    elif base is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(base, type) and base not in (float, int, list, tuple, dict) and isinstance(value, base):
        return value
    raise TypeError(f"found {format_value(value)}, expected {_type_words(hint)}")
