"""Declared options: from fields to constructors, command lines and tables."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import UnknownOptionError, VisConfigError, did_you_mean

_MAX_SHOWN = 200  # characters of a value in a message

Check = Callable[[str, Any], Any]
"""Gives the value as the package uses it; raises VisConfigError."""


def option(default: Any, check: Check, help: str, **command_line: Any) -> Any:
    """Declare an option.

    Args:
        default: Its default, as a user would write it.
        check (Callable): Called with name and value.
        help (str): For ``--help`` and the tables, in Markdown.
        **command_line: What ``argparse`` needs besides; ``program_default`` is a
            default of the programs alone.
    """
    metadata = {"check": check, "help": help, "command_line": command_line}
    return field(default=default, metadata=metadata)


def register_once(registry: dict[str, Any], kind: str, entry: Any) -> None:
    """Register an entry that has a ``name`` and a ``function``.

    A cell of a notebook that is run again replaces its own function, which is that of
    the same module and qualified name.

    Args:
        registry (dict): Entries by name.
        kind (str): What they are, for the message: ``'method'``.
        entry: The new one.

    Raises:
        VisConfigError: If the name is none, or belongs to another function.
    """

    def place(own: Any) -> str:
        function = getattr(own.function, "func", own.function)  # of a partial
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"{named.__module__}.{named.__qualname__}"

    if not isinstance(entry.name, str) or not entry.name:
        raise refuse(kind, entry.name, "give it a name that users can write")
    known = registry.get(entry.name)
    if known is not None and place(known) != place(entry):
        raise VisConfigError(
            f"{kind}={entry.name!r} is registered already, by {place(known)}; choose "
            "another name"
        )
    registry[entry.name] = entry


def one_of(name: str, value: Any, values: Iterable[str | None]) -> Any:
    """A value that is one of some; else a ``VisConfigError`` names the nearest."""
    known = list(values)
    if (value is None or isinstance(value, str)) and value in known:
        return value
    remedy = did_you_mean(
        value, filter(None, known), f"use one of {', '.join(map(repr, known))}"
    )
    raise VisConfigError(f"{name}={value!r} is unknown; {remedy}")


def refuse(name: str, value: Any, remedy: str) -> VisConfigError:
    """The error for a value that cannot work."""
    text = " ".join(repr(value).split())  # a module prints lines of it
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return VisConfigError(f"{name}={shown} cannot work: {remedy}")


@dataclass(frozen=True)
class Options:
    """Checked values; a copy with others comes from ``dataclasses.replace``.

    Raises:
        VisConfigError: If a value can never work.
    """

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            checked = declared.metadata["check"](declared.name, value)
            object.__setattr__(self, declared.name, checked)


def fields_of(kind: type[Options]) -> list[dataclasses.Field]:
    """The options of a kind, its own ones before those that it shares."""
    own = vars(kind).get("__annotations__", {})
    return sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)


ENDED = {
    "backend_args": "images are read by the test pipeline's own loading steps, with "
    "the backend_args that these have; leave it out",
}
"""Options of earlier versions, and what to do instead."""

_Options = TypeVar("_Options", bound=Options)


def read_options(
    owner: str,
    given: Mapping[str, Any],
    *kinds: type[_Options],
    offered: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Check options that a user gave by keyword; give one of each kind.

    Args:
        owner (str): Who takes them, for the messages: ``'BoxAMVisHook'``.
        given (Mapping): Names and values.
        *kinds (type): Kinds of options that the owner has.
        offered (Sequence[str]): Those that the message of an unknown one offers.
            Defaults to all of the kinds.

    Raises:
        UnknownOptionError: If none of the kinds has an option of a name.
        VisConfigError: If a value can never work.
    """
    names = {kind: [own.name for own in fields_of(kind)] for kind in kinds}
    known = [name for own in names.values() for name in own]
    for name in given:
        if name in ENDED:
            raise UnknownOptionError(
                f"{owner} has no option {name!r} any more: {ENDED[name]}"
            )
        if name not in known:
            shown = offered or known
            near = difflib.get_close_matches(name, shown, n=1) or shown
            raise UnknownOptionError(
                f"{owner} has no option {name!r}; use {', '.join(near)}"
            )
    return tuple(
        kind(**{name: given[name] for name in own if name in given})
        for kind, own in names.items()
    )


def takes_options(*kinds: type[Options]) -> Callable[[Any], Any]:
    """Give a class or function that takes ``**options`` their signature and docs."""

    def decorate(owner: Any) -> Any:
        fields = [own for kind in kinds for own in fields_of(kind)]
        own = [
            parameter
            for parameter in inspect.signature(owner).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        keyword = inspect.Parameter.KEYWORD_ONLY
        declared = [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type)
            for f in fields
        ]
        owner.__signature__ = inspect.Signature([*own, *declared])
        lines = "".join(_doc_line(f) for f in fields)
        owner.__doc__ = inspect.cleandoc(owner.__doc__ or "").replace(
            "{options}", textwrap.indent(lines, "    ").strip()
        )
        return owner

    return decorate


def _doc_line(declared: dataclasses.Field) -> str:
    text = f"{declared.name}: {declared.metadata['help']}. "
    text += f"Defaults to {declared.default!r}."
    return textwrap.fill(text.replace("`", ""), 84, subsequent_indent="    ") + "\n"


def add_arguments(
    parser: argparse.ArgumentParser, kind: type[Options], without: Sequence[str] = ()
) -> None:
    """Give a command line the options of a kind, ``--num-masks`` for ``num_masks``."""
    for declared in fields_of(kind):
        if declared.name in without:
            continue
        extra = dict(declared.metadata["command_line"])
        default = extra.pop("program_default", declared.default)
        help = re.sub("`'?([^`]*?)'?`", r"\1", declared.metadata["help"])
        help = re.sub(r"\[(\w+)\]\(([^)]+)\)", r"\1 in \2", help)
        name = "--" + declared.name.replace("_", "-")
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction if default else "store_true"
            parser.add_argument(name, action=action, default=default, help=help)
            continue
        if not isinstance(default, (str, tuple, type(None))):
            extra.setdefault("type", type(default))
        parser.add_argument(name, default=default, help=help, **extra)


def options_from(args: argparse.Namespace, kind: type[_Options]) -> _Options:
    """The options of a kind that a command line gave."""
    return kind(**{own.name: getattr(args, own.name) for own in fields_of(kind)})


def option_rows(kind: type[Options]) -> list[tuple[str, str, str]]:
    """Name, default and help of each option, for tables in documents."""
    return [
        (own.name, repr(own.default), own.metadata["help"]) for own in fields_of(kind)
    ]
