"""``python -m tpt_nb.course release`` and ``python -m tpt_nb.course grade``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tpt_nb.core.paths import REPO, cache_dir
from tpt_nb.course import rubrics, sandbox
from tpt_nb.course.execution import Options
from tpt_nb.course.feedback import totals, write_grades
from tpt_nb.course.grading import WAITS, exposed, grade
from tpt_nb.course.masters import Master, Mistake, load_masters, release


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tpt_nb.course", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("release", help="write the student and the solution versions")
    one.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the student version alone, in student/"
    )
    one.add_argument("--check", action="store_true", help="compare instead of writing")
    two = commands.add_parser("grade", help="grade a folder of submissions")
    two.add_argument("submissions", type=Path, help="STUDENT.ipynb or STUDENT/NAME.ipynb in it")
    two.add_argument("--out", type=Path, default=Path("grades.csv"), metavar="CSV")
    two.add_argument("--jobs", type=int, default=1, help="submissions at a time (default: 1)")
    two.add_argument("--isolation", default="auto", choices=["auto", *sandbox.WAYS])
    two.add_argument("--cell-timeout", type=float, default=20, metavar="S", help="default: 20")
    two.add_argument("--timeout", type=float, default=300, metavar="S", help="of a submission")
    two.add_argument("--memory", type=float, default=4, metavar="GB", help="per process")
    two.add_argument("--again", action="store_true", help="run what was graded before, too")
    for command in (one, two):
        command.add_argument(
            "--notebooks", type=Path, default=REPO / "notebooks", help="folder of the masters"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 1 if ``release --check`` found differences, 2 for a mistake."""
    args = arguments(argv)
    try:
        masters = load_masters(args.notebooks)
        if args.command == "release":
            versions = ("student", "solution") if args.out else ("student",)
            out = args.out or args.notebooks
            files = release(masters, out, versions, compare=args.check)
            for name in files:
                print(("differs: " if args.check else "") + str(out / name))
            return 1 if args.check and files else 0
        return _grade(args, masters)
    except (Mistake, RuntimeError, OSError) as error:
        print(f"python -m tpt_nb.course: {error}", file=sys.stderr)
        return 2


def _grade(args: argparse.Namespace, masters: dict[str, Master]) -> int:
    way = sandbox.choose(args.isolation)
    limits = sandbox.Limits(seconds=args.timeout, memory=int(args.memory * 2**30))
    options = Options(way, args.cell_timeout, limits)
    cache = cache_dir() / "grades"
    if way == "rlimits":
        print("isolation: rlimits. THE NETWORK AND YOUR FILES ARE OPEN TO THE ANSWERS.")
    else:
        print(f"isolation: {way} (no network, no files but Python, its packages, tpt_nb and data)")
        for path in exposed([args.notebooks, args.submissions, args.out.parent, cache]):
            raise Mistake(f"{path} could be read by the answers: move it out of there")
    rows, handed_in = grade(
        args.submissions, masters, options, args.jobs, None if args.again else cache
    )
    rows = rubrics.apply(args.out, rows, handed_in, masters)
    sums, pages = write_grades(args.out, rows, handed_in, masters)
    for total in totals(rows).to_dict("records"):
        print("{student:24} {points:7g} of {max:g}  {percent:5.1f} %".format(**total))
    print(f"{args.out}, {sums}, {pages}/")
    waiting = sum(row.status == WAITS for row in rows)
    if waiting:
        print(
            f"{waiting} answers in words wait for you (their points are not counted yet): read them"
        )
        print(f"in {pages}/, fill in the points in {rubrics.sheet_of(args.out)}, and grade again.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
