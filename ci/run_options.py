"""The options of ``bash ci/run``, and what the notebooks' parameters may be.

Standard library only: ``ci/run`` asks here before anything is installed, so that ``--help`` and a
mistake are answered at once. Run as a file, it checks its arguments and does nothing.
"""

import argparse
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tpt_nb.lessons import parameters  # noqa: E402


class Mistake(Exception):
    """Something in what was asked for; its text is for the user."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of ``bash ci/run``."""
    parser = argparse.ArgumentParser(
        prog="bash ci/run",
        description="Execute the notebooks; results, pages and logs go to out/.",
        epilog="bash ci/run --rehearse [--help]: the full profile, without network or GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NN", help="a notebook's number; repeatable")
    add("--profile", choices=["mini", "full"], help="default: the notebooks' own choice (auto)")
    add("--out", type=Path, default=REPO / "out", metavar="DIR", help="default: out")
    add(
        "-p",
        "--param",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="another value for a parameter of the notebooks that run; repeatable",
    )
    add("--in-place", action="store_true", help="write executed notebooks back, to be committed")
    add("--jobs", type=int, metavar="N", help="notebooks at a time (one per core; full: 1)")
    add("--timeout", type=int, metavar="S", help="end what makes no progress for S seconds (600)")
    add("--notebooks", type=Path, default=REPO / "notebooks", metavar="DIR", help="another folder")
    return parser.parse_args(argv)


def find(folder: Path, only: list[str]) -> list[Path]:
    """The numbered notebooks in order, or those asked for; ``Mistake`` for an unknown number."""
    known = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [number.strip().zfill(2) for text in only for number in text.split(",")]
    for number in wanted:
        if number not in known:
            raise Mistake(f"there is no notebook {number}; there are: {', '.join(known) or 'none'}")
    return [path for number, path in known.items() if not wanted or number in wanted]


def declared(path: Path) -> dict[str, tuple]:
    """Name -> (annotation, default) in the notebook's ``parameters`` cell."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return parameters.assigned("".join(cell["source"]))
    return {}


def choose_parameters(
    path: Path, args: argparse.Namespace, out: Path, given: dict[str, str]
) -> dict[str, str]:
    """What to pass to this notebook. papermill only warns about a name that it does not know (and
    its value then changes nothing), so such a name is a ``Mistake`` here, as is a wrong type.
    """
    known = declared(path)
    params = {"out_dir": str(out / "runs")} if "out_dir" in known else {}
    wanted = ({"profile": args.profile} if args.profile else {}) | given
    if wanted and not known:
        raise Mistake(f"{path.name} has no parameters (no cell tagged 'parameters').")
    try:
        parameters.check(known, {name: typed(value) for name, value in wanted.items()})
    except parameters.WrongParameter as error:
        raise Mistake(f"{path.name}: {error}") from error
    return params | wanted


def typed(text: str) -> object:
    """A value as papermill's ``-p`` reads it."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_text(path: Path, name: str) -> bool:
    """Is a parameter a text, which papermill must not read as a number (``-p root 2024``)?"""
    note, default = declared(path)[name]
    return note.startswith("str") or isinstance(default, str)


if __name__ == "__main__":
    asked = arguments(None)
    try:
        for found in find(asked.notebooks, asked.only):
            choose_parameters(found, asked, asked.out, dict(asked.param))
    except Mistake as mistake:
        print(f"ci/run: {mistake}", file=sys.stderr)
        sys.exit(2)
