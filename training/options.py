"""Fields of a dataclass as options of a command."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def option(
    default: Any, help: str, choices: Sequence[str] | None = None, kind: type[Any] | None = None
) -> Any:
    """A dataclass field that `add_options` makes a flag of.

    Args:
        default: its value where nothing is said.
        help: what it is, for people.
        choices: all that it may be.
        kind: what the flag's text becomes; the default's own type unless that is None.
    """
    kind = kind or type(default)
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "kind": kind}
    )


def add_options(parser: argparse.ArgumentParser, kind: type[Any], title: str) -> None:
    """One flag for each field of `kind`; flags that are not given leave no trace."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        shown = "" if field.default is None else f" (default: {field.default})"
        text = field.metadata["help"].replace("%", "%%") + shown
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            continue
        choices, kind = field.metadata["choices"], field.metadata["kind"]
        group.add_argument(
            flag,
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else "VALUE" if kind is str else "N",
            help=text,
        )


def given(arguments: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The fields of `kind` that were given on the command line."""
    names = [f.name for f in dataclasses.fields(kind)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def check_choices(value: Any) -> None:
    """Raise ValueError where a field holds none of its choices."""
    for field in dataclasses.fields(value):
        choices = field.metadata.get("choices")
        chosen = getattr(value, field.name)
        if choices and chosen is not None and chosen not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {chosen!r}")
