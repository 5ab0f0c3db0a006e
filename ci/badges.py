"""Write the repository's address into the notebooks and the README.

``python ci/badges.py`` puts a Colab badge at the top of every notebook, the address into the setup
that begins their first code cell, and a request for a T4 into their metadata. The badge opens the
student's copy, a second link the notebook with solutions; the copies in ``notebooks/student`` are
made anew. The address is that of ``git remote`` and of the last tag (without one: the branch), or
``--repo OWNER/NAME --ref TAG``; where there is neither, a placeholder says what to do. Point badges
to a tag: a branch changes under its readers.

``--classroom DIR`` writes the students' copies with this address to ``DIR`` and changes nothing
else. ``--check`` changes nothing and fails if something is not as it would be written. Outputs are
left as they are: run ``bash ci/run --in-place`` behind it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from tpt_nb.course.masters import load_master, load_masters, release, version

GITHUB = re.compile(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$")
ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = ("OWNER/NAME", "TAG")
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\).*\n*", re.MULTILINE)
NOTE = " *(placeholder: no public address yet; `python ci/badges.py` writes it here)*"
TODO = """\
> **Placeholder.** This repository has no public address yet. Push it to GitHub and run
> `python ci/badges.py`: it takes the address from `git remote` and writes it in the place of
> `OWNER/NAME` and `TAG`, here and in all notebooks.

"""
WHERE = re.compile(r"^> \*\*Placeholder\.\*\*.*\n(?:> .*\n)*\n", re.MULTILINE)
SETUP = """\
import importlib.util, os, sys

clone = "git clone -qb {ref} --depth=1 https://github.com/{repo} tpt_nb_clone"  # if it came alone
sys.path.extend(map(os.path.abspath, ["..", "../..", "tpt_nb_clone"]))  # the clone around it
if not importlib.util.find_spec("tpt_nb") and (os.system(clone) or importlib.invalidate_caches()):
    raise OSError("No network? On Kaggle, switch on Internet in the settings of the notebook.")
"""
OLDER = """\
import importlib.util, os, sys

sys.path.extend(map(os.path.abspath, ["..", "../..", "tpt_nb_clone"]))  # the clone around it
if not importlib.util.find_spec("tpt_nb"):  # this notebook came alone (Colab, Kaggle)
    os.system("git clone -qb {ref} --depth=1 https://github.com/{repo} tpt_nb_clone")
    importlib.invalidate_caches()
"""
FORMS = [re.escape(form.format(repo="@", ref="@")) for form in (SETUP, OLDER)]
STAMPED = re.compile(rf"\A(?:{'|'.join(FORMS)})".replace("@", r"[\w./-]+"), re.ASCII)
GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True}}


def address(root: Path) -> tuple[str, str]:
    """(OWNER/NAME, tag or branch) of the repository on GitHub, or the placeholder."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if not done.returncode else ""

    names = git("remote").split()
    name = "origin" if "origin" in names else next(iter(names), "")
    found = name and GITHUB.search(git("remote", "get-url", name))
    ref = git("describe", "--tags", "--abbrev=0") or git("branch", "--show-current")
    return (found[1], ref) if found and ref else PLACEHOLDER


def badge(name: str, repo: str, ref: str) -> str:
    """The Markdown of the badge that opens the student's copy, and of the link to the solutions."""
    note = NOTE if (repo, ref) == PLACEHOLDER else ""
    picture = f"{COLAB}/assets/colab-badge.svg"
    place = f"{COLAB}/github/{repo}/blob/{ref}/notebooks"
    return (
        f"[![Open in Colab]({picture})]({place}/student/{name}) · "
        f"[with solutions]({place}/{name}){note}"
    )


def setup_cell(source: str, repo: str, ref: str) -> str:
    """A notebook's first code cell with the address in it; its imports and ``start`` stay.

    Raises ``ValueError`` if it does not begin with the lines that all notebooks share.
    """
    source, found = STAMPED.subn(lambda _: SETUP.format(repo=repo, ref=ref), source)
    if not found:
        raise ValueError("the first code cell does not begin with ci/badges.py's SETUP")
    return source


def stamp(notebook: nbformat.NotebookNode, name: str, repo: str, ref: str) -> None:
    """Badge, address and metadata of one notebook, in place; ``ValueError`` if it has no place."""
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        raise ValueError("the first cell is not a heading")
    heading, _, text = BADGE.sub("", first.source).partition("\n")
    first.source = f"{heading}\n\n{badge(name, repo, ref)}\n\n{text.lstrip()}".rstrip()
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source = setup_cell(code.source, repo, ref)
    notebook.metadata.update(GPU)


def readme(text: str, first: str, repo: str, ref: str) -> str:
    """The README with the first notebook's badge and its commands of Colab for this address."""
    todo = TODO if (repo, ref) == PLACEHOLDER else ""
    text = BADGE.sub(lambda _: f"{todo}{badge(first, repo, ref)}\n\n", WHERE.sub("", text))
    clone = f"git clone --branch {ref} https://github.com/{repo}"
    text = re.sub(r"git clone --branch \S+ https://github\.com/\S+", clone, text)
    return re.sub(r"^%cd \S+$", f"%cd {repo.split('/')[1]}", text, flags=re.MULTILINE)


def rendered(root: Path, repo: str, ref: str) -> dict[Path, str]:
    """Each file as it should be; ``ValueError`` names a notebook that cannot be stamped."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    page = root / "README.md"
    pages = {page: readme(page.read_text("utf-8"), paths[0].name, repo, ref)}
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        try:
            stamp(notebook, path.name, repo, ref)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        pages[path] = nbformat.writes(notebook) + "\n"
    return pages


def students(folder: Path) -> None:
    """Make the committed students' copies of a folder of notebooks anew, where it has some."""
    if (folder / "student").is_dir():
        release(load_masters(folder), folder, ["student"])
        print(f"{folder.name}/student: made anew")


def classroom(pages: dict[Path, str], out: Path) -> None:
    """Write the students' copies of stamped notebooks."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for path, text in pages.items():
            if path.suffix == ".ipynb":
                (stamped := Path(folder, path.name)).write_text(text, encoding="utf-8")
                copy = version(load_master(stamped), "student")
                (out / path.name).write_text(nbformat.writes(copy) + "\n", encoding="utf-8")
                print(out / path.name)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the repository's address where it is read.")
    parser.add_argument("--repo", help="OWNER/NAME on GitHub; default: that of git remote")
    parser.add_argument("--ref", help="a tag (or a branch); default: the last tag")
    parser.add_argument("--classroom", type=Path, metavar="DIR", help="only the students' copies")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if one differs")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if (args.repo is None) != (args.ref is None):
        parser.error("give both --repo and --ref, or none of them")
    repo, ref = (args.repo, args.ref) if args.repo is not None else address(args.root)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or not re.fullmatch(r"[\w./-]+", ref):
        parser.error("--repo is OWNER/NAME, --ref a tag such as v1.0")
    try:
        pages = rendered(args.root, repo, ref)
    except ValueError as error:
        print(f"ci/badges.py: {error}", file=sys.stderr)
        return 2
    if args.classroom:
        classroom(pages, args.classroom)
        return 0
    bad = 0
    for path, new in pages.items():
        if new == path.read_text("utf-8"):
            continue
        bad += 1
        if args.check:
            print(f"{path.relative_to(args.root)} is not as ci/badges.py writes it")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(args.root)}: stamped for {repo} at {ref}")
    if not args.check:
        students(args.root / "notebooks")
    return int(bool(bad and args.check))


if __name__ == "__main__":
    sys.exit(main())
