"""Messages for people: the closest known name, a line once, a progress bar."""

import difflib
import os
from collections.abc import Iterable


def unknown(what: str, got: object, known: Iterable[str]) -> str:
    """Message for a name that is not among the known ones, with the closest of them."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(got).lower(), lower, n=1)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else "."
    return f"unknown {what} {got!r}{hint} Known: {', '.join(known)}."


def bar(n: int, done: int, text: str, progress: bool = True, unit: str = "img"):
    """A tqdm bar over ``n`` that starts at ``done``; silent under ``TQDM_DISABLE``."""
    from tqdm.auto import tqdm

    # in a notebook tqdm.auto gives a widget, and that one does not look at TQDM_DISABLE itself
    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    return tqdm(total=n, initial=done, desc=text, unit=unit, **off)


_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a line, the first time that this process has it to say."""
    if text not in _said:
        _said.add(text)
        print(text, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]
