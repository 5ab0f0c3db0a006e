"""Write the repository's address into the notebooks and the README.

``python ci/badges.py --repo OWNER/NAME --ref TAG`` puts a Colab badge at the top of every notebook,
the address into the setup that begins their first code cell, and a request for a T4 into their
metadata. Without ``--repo`` and ``--ref`` it leaves a marked placeholder, which is what the
repository holds until it has a public address. ``--check`` changes nothing and fails if something
is not as it would be written. Point badges to a tag: the main branch changes under its readers.

Outputs are left as they are: run ``bash ci/run --in-place`` behind it.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = ("OWNER/NAME", "TAG")
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\).*\n*", re.MULTILINE)
NOTE = " *(placeholder: the repository has no public address yet)*"
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


def badge(path: str, repo: str, ref: str) -> str:
    """The Markdown of the badge that opens a file of the repository."""
    note = NOTE if (repo, ref) == PLACEHOLDER else ""
    picture = f"{COLAB}/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})]({COLAB}/github/{repo}/blob/{ref}/{path}){note}"


def setup_cell(source: str, repo: str, ref: str) -> str:
    """A notebook's first code cell with the address in it; its imports and ``start`` stay.

    Raises ``ValueError`` if it does not begin with the lines that all notebooks share.
    """
    source, found = STAMPED.subn(lambda _: SETUP.format(repo=repo, ref=ref), source)
    if not found:
        raise ValueError("the first code cell does not begin with ci/badges.py's SETUP")
    return source


def stamp(notebook: nbformat.NotebookNode, path: str, repo: str, ref: str) -> None:
    """Badge, address and metadata of one notebook, in place; ``ValueError`` if it has no place."""
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        raise ValueError("the first cell is not a heading")
    heading, _, text = BADGE.sub("", first.source).partition("\n")
    first.source = f"{heading}\n\n{badge(path, repo, ref)}\n\n{text.lstrip()}".rstrip()
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source = setup_cell(code.source, repo, ref)
    notebook.metadata.update(GPU)


def readme(text: str, repo: str, ref: str) -> str:
    """The README with its badge and its commands of Colab for this address."""
    notebook = "notebooks/01_clip_background.ipynb"
    text = BADGE.sub(lambda _: badge(notebook, repo, ref) + "\n\n", text)
    clone = f"git clone --branch {ref} https://github.com/{repo}"
    text = re.sub(r"git clone --branch \S+ https://github\.com/\S+", clone, text)
    return re.sub(r"^%cd \S+$", f"%cd {repo.split('/')[1]}", text, flags=re.MULTILINE)


def rendered(root: Path, repo: str, ref: str) -> dict[Path, str]:
    """Each file as it should be; ``ValueError`` names a notebook that cannot be stamped."""
    pages = {root / "README.md": readme((root / "README.md").read_text("utf-8"), repo, ref)}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            stamp(notebook, path.relative_to(root).as_posix(), repo, ref)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        pages[path] = nbformat.writes(notebook) + "\n"
    return pages


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the repository's address where it is read.")
    parser.add_argument("--repo", default=PLACEHOLDER[0], help="OWNER/NAME on GitHub")
    parser.add_argument("--ref", default=PLACEHOLDER[1], help="a tag (or a branch)")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if one differs")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo) or not re.fullmatch(r"[\w./-]+", args.ref):
        parser.error("--repo is OWNER/NAME, --ref a tag such as v1.0")
    if (args.repo == PLACEHOLDER[0]) != (args.ref == PLACEHOLDER[1]):
        parser.error("give both --repo and --ref, or none of them")
    try:
        pages = rendered(args.root, args.repo, args.ref)
    except ValueError as error:
        print(f"ci/badges.py: {error}", file=sys.stderr)
        return 2
    bad = 0
    for path, new in pages.items():
        if new == path.read_text("utf-8"):
            continue
        bad += 1
        if args.check:
            print(f"{path.relative_to(args.root)} is not as ci/badges.py writes it")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(args.root)}: stamped for {args.repo} at {args.ref}")
    return int(bool(bad and args.check))


if __name__ == "__main__":
    sys.exit(main())
