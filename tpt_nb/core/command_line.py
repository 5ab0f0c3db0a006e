"""The fields of dataclasses as options of a command."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from tpt_nb.core.messages import unknown

PROG = "python -m tpt_nb"
Fields = Mapping[str, tuple[object, object, str]]  # name -> type, default, help


def setting(default, text: str):
    """A field that is an option of a command, with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the closest option."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        print(f"{self.prog}: {message} (--help lists what there is)", file=sys.stderr)
        raise SystemExit(2)


def fields_of(*kinds: type) -> dict:
    """Name -> type, default, help of the fields of dataclasses; methods' options by flat names."""
    out = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.metadata:
                name = f.metadata.get("flat") or f.name
                out.setdefault(name, (hints[f.name], f.default, f.metadata["help"]))
    return out


def parse(
    command: str,
    text: str,
    fields: Fields,
    argv: Sequence[str],
    positional: Mapping[str, int] | None = None,
) -> dict:
    """The values that were given on a command line, by the fields' names; no defaults.

    ``--n-aug`` and ``--n_aug`` are the same. Exits with one line for what is wrong.
    """
    parser = Parser(prog=f"{PROG} {command}", description=text, allow_abbrev=False)
    for name, number in (positional or {}).items():
        parser.add_argument(name, nargs=number, metavar=name.upper())
    for name, (hint, default, about) in fields.items():
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else repr(default)
        more: dict = {"help": f"{about} (default: {shown})".replace("%", "%%")}
        if hint is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is list:
            more |= {"type": typing.get_args(hint)[0], "nargs": "+", "metavar": "X"}
        else:
            more |= {"type": _reader(hint), "metavar": "X"}
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **more)
    words = [w.split("=") for w in argv]
    plain = ["=".join([_dashes(w[0]), *w[1:]]) for w in words]
    values, rest = parser.parse_known_args(plain)
    if rest:
        known = [f"--{name}" for name in fields]
        parser.error(unknown("option", rest[0].split("=")[0], known).rstrip("."))
    return vars(values)


def _dashes(word: str) -> str:
    """``--n-aug`` -> ``--n_aug``; ``--no-csc`` stays, as argparse spells it."""
    if not word.startswith("--") or word.startswith("--no-"):
        return word
    return "--" + word[2:].replace("-", "_")


def _reader(hint: object) -> Callable[[str], object]:
    """What turns the text of an option into the field's type; none, null and '' give None."""
    kinds = [k for k in typing.get_args(hint) or (hint,) if isinstance(k, type)]

    def read(text: str):
        if type(None) in kinds and text.lower() in ("", "none", "null"):
            return None
        return kinds[0](text)

    read.__name__ = kinds[0].__name__  # argparse: "invalid int value"
    return read
