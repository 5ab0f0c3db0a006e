"""Messages for people: the closest known name, a line once, a progress bar."""

import difflib
import os
import typing


def unknown(what: str, got: object, known: typing.Iterable[str]) -> str:
    """Message for a name that is not among the known ones, with the closest of them."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(got).lower(), lower, n=1)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else "."
    return f"unknown {what} {got!r}{hint} Known: {', '.join(known)}."


def _bar(n: int, done: int, text: str, progress: bool):
    from tqdm.auto import tqdm

    # in a notebook tqdm.auto gives a widget, and that one does not look at TQDM_DISABLE itself
    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    return tqdm(total=n, initial=done, desc=text, unit="img", **off)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
