"""A dataclass as the schema of a section: the types of its fields, their docs, and checking values against them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from alignkit.config.toml import format_value
from alignkit.errors import PluginError


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field that can be set. A class that is no dataclass has none.

    Raises PluginError for an annotation that is not understood at run time (a name imported for type checkers only).
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    result = {}
    for field in (f for f in dataclasses.fields(cls) if f.init):
        owner = next(k for k in cls.__mro__ if field.name in inspect.get_annotations(k))
        holder = types.SimpleNamespace(__annotations__={field.name: field.type})
        try:
            hints = typing.get_type_hints(holder, globalns=vars(sys.modules[owner.__module__]))
        except (NameError, TypeError) as error:
            what = f"{cls.__module__}.{cls.__name__}.{field.name}"
            raise PluginError(f"{what}: the annotation cannot be read: {error}") from error
        result[field.name] = hints[field.name]
    return result


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstrings beneath the fields of a class and its bases, each on one line."""
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
    """The default of each field that has one."""
    values = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.init and field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def describe(hint: Any) -> str:
    """A type in the words of a run file: "integer", "list of number", '"no" or "bf16"'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(format_value(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args if a is not type(None))
    if origin in (list, tuple) and args:
        inner = [describe(a) for a in args if a is not Ellipsis]
        return f"list of {inner[0]}" if origin is list or Ellipsis in args else f"list of {', '.join(inner)}"
    words = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "string", Any: "anything"}
    words |= {list: "list", tuple: "list", dict: "table"}
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: an integer may stand for a float, a list for a tuple, a string for a path.

    Raises TypeError, with what was found and expected, for anything else, nan included.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    base = origin or hint
    if base is Any:
        return value
    if base is Literal:
        if any(type(value) is type(a) and value == a for a in args):
            return value
    elif base in (Union, types.UnionType):
        # An exact type before one that needs conversion: in `float | int` 3 stays an integer.
        for option in sorted(args, key=lambda a: type(value) is not a):
            if value is None and option is type(None):
                return None
            try:
                return convert(value, option)
            except TypeError:
                continue
    elif base in (list, tuple) and isinstance(value, list | tuple):
        each = args or (Any, ...)
        items = each[:1] * len(value) if base is list or Ellipsis in each else each
        with contextlib.suppress(TypeError):  # the message below shows the whole list
            if len(items) == len(value):
                return base(convert(item, one) for item, one in zip(value, items, strict=True))
    elif base is dict and isinstance(value, dict):
        return {key: convert(item, args[1] if args else Any) for key, item in value.items()}
    elif base in (float, int) and isinstance(value, int | float) and not isinstance(value, bool):
        if value == value and (base is float or isinstance(value, int)):  # nan is no number
            return base(value)
    elif base is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(base, type) and base not in (float, int, list, tuple, dict) and isinstance(value, base):
        return value
    raise TypeError(f"found {format_value(value)}, expected {describe(hint)}")
