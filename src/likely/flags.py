"""Settings as flags of a verb: one flag a field, named and explained by it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel

# What a flag means alone, and what can follow it: the parser wants a value after every flag.
ALONE = {"--resume": ("newest", r"step-.*|newest.*"), "--rank": ("20", r"-?\d+")}


def with_value(arguments: list[str]) -> list[str]:
    """The arguments, with the value that a flag has where none follows it."""
    given = []
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        default, value = ALONE.get(argument, ("", ""))
        given.append(f"{argument}={default}" if default and not re.fullmatch(value, following) else argument)
    return given


def _flag_type(annotation: Any) -> Any:
    """The plain type of a config field: constraints are checked by the config itself, with its own words."""
    if get_origin(annotation) is Annotated:
        return _flag_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return _flag_type(inner)
    return annotation


def with_flags(*kinds: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb one flag per field of its settings; those the user gave arrive as ``settings``."""
    fields = {key: field for kind in kinds for key, field in kind.model_fields.items()}

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            settings = {key: values.pop(key) for key in fields}
            verb(settings={k: v for k, v in settings.items() if v is not None}, **values)

        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "settings"]
        flags = []
        for key, field in fields.items():
            default = "" if field.is_required() or field.default in (None, False) else f" [{field.default}]"
            option = typer.Option(
                f"--{key.replace('_', '-')}", help=f"{field.description}{default}", show_default=False
            )
            hint: Any = Annotated[_flag_type(field.annotation) | None, option]
            flags.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        call.__signature__ = inspect.Signature([*keyword, *flags])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in [*keyword, *flags]}
        call.__doc__ = verb.__doc__
        return call

    return decorate
