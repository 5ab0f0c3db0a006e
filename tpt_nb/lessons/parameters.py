"""Values that papermill gives to a notebook's parameters: names and types, before anything runs.

papermill only warns about a name that the notebook does not have, and its value then changes
nothing; what looks like a number arrives as one, also where a text is meant (``-p root 2024``).
:func:`watch` puts a check before the cell that papermill injects behind the ``parameters`` cell: a
wrong one is refused in one line, with no later cell run. ``ci/run`` asks :func:`check` earlier.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from tpt_nb.core.messages import unknown

MARK = "# Parameters"  # how papermill begins the cell that it injects
NUMBERS = (int, float)


class WrongParameter(ValueError):
    """What was given is no parameter of the notebook, or of another type; one line."""

    def _render_traceback_(self) -> list[str]:  # IPython shows it in place of a traceback
        return [f"{type(self).__name__}: {self}"]


def assigned(source: str) -> dict[str, tuple[str, Any]]:
    """Name -> (annotation, value) of what a cell assigns; nothing if it is no Python.

    The annotation is empty where there is none; a value that is no literal is ``...``.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    found = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if not names or getattr(node, "value", None) is None:
            continue
        note = getattr(node, "annotation", None)
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            value = ...
        found |= {name: (ast.unparse(note) if note else "", value) for name in names}
    return found


def check(declared: Mapping[str, tuple[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the notebook's types say: a number for a ``str`` is its text, 3.0 an ``int``.

    Args:
        declared: what :func:`assigned` finds in the parameters cell.
    Raises:
        WrongParameter: no such name, with the closest one; a value of another type.
    """
    for name in given:
        if name not in declared:
            raise WrongParameter(unknown("parameter", name, list(declared)))
    return {name: _fit(name, *declared[name], value) for name, value in given.items()}


def _fit(name: str, note: str, default: Any, value: Any) -> Any:
    wanted = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
    kind = wanted.get(note.split("|")[0].split("[")[0].strip(), type(default))
    if (value is None and default is None) or kind in (type(None), type(...)):
        return value
    number = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if kind is str and number:
        return str(value)
    if kind is float and number:
        return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        usual = f" (default {default!r})"
        raise WrongParameter(
            f"{name} is {value!r} ({type(value).__name__}); it must be {kind.__name__}{usual}."
        )
    return value


def replaced(lines: Sequence[str], before: str) -> list[str]:
    """A cell about to run, after a cell ``before``: checked, if it is papermill's.

    Raises :class:`WrongParameter`.
    """
    source = "".join(lines)
    declared = assigned(before)
    if not source.startswith(MARK) or not declared:
        return list(lines)
    given = {name: value for name, (_, value) in assigned(source).items() if value is not ...}
    fitting = check(declared, given)
    changed = [f"{name} = {x!r}\n" for name, x in fitting.items() if x is not given[name]]
    return [*lines, *(["\n"] if changed else []), *changed]


def watch() -> None:
    """Have the running notebook's injected cell checked; nothing outside of a notebook."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None or any(hasattr(f, "checks_parameters") for f in _checks(shell)):
        return

    def look(lines: list[str]) -> list[str]:
        return replaced(lines, shell.user_ns.get("In", [""])[-1])

    look.checks_parameters = True
    shell.input_transformers_post.append(look)


def _checks(shell) -> list:
    return list(getattr(shell, "input_transformers_post", []))
