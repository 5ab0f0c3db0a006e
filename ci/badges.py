"""Write the repository's address into the notebooks and the README.

``python ci/badges.py --repo OWNER/NAME --ref TAG`` puts a Colab badge at the top of every notebook,
the one setup that all of them share into their first code cell, and a request for a T4 into their
metadata. Without ``--repo`` and ``--ref`` it leaves a marked placeholder, which is what the
repository holds until it has a public address. ``--check`` changes nothing and fails if something
is not as it would be written. Point badges to a tag: the main branch changes under its readers.

Outputs are left as they are: run ``bash ci/run --in-place`` behind it.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = ("OWNER/NAME", "TAG")
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\).*\n*", re.MULTILINE)
NOTE = " *(placeholder: the repository has no public address yet)*"
BLOCK = """\
try:
    import tpt_nb.lessons.setup
except ModuleNotFoundError:  # not installed: use the clone around this notebook, or make one
    folders = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "tpt_nb_clone"]
    home = next((f for f in folders if (f / "tpt_nb" / "paths.py").is_file()), folders[-1])
    if not home.is_dir():  # Colab, Kaggle
        url = "https://github.com/{repo}"{mark}
        command = ["git", "clone", "--quiet", "--depth=1", "--branch={ref}", url, str(home)]
        subprocess.run(command, check=True)
    sys.path.insert(0, str(home))
    import tpt_nb.lessons.setup

    tpt_nb.lessons.setup.install()
"""
MARK = "  # placeholder: ci/badges.py"
NEEDS = ("import subprocess", "import sys", "from pathlib import Path")
READY = "tpt_nb.lessons.setup.ready()  # ready(drive=True): on Colab, keep results on your Drive"
VERSIONS = re.compile(r"^print\(f\"python \{platform\.python_version.*\)$", re.MULTILINE)
GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True}}


def badge(path: str, repo: str, ref: str) -> str:
    """The Markdown of the badge that opens a file of the repository."""
    note = NOTE if (repo, ref) == PLACEHOLDER else ""
    picture = f"{COLAB}/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})]({COLAB}/github/{repo}/blob/{ref}/{path}){note}"


def setup_cell(source: str, repo: str, ref: str) -> str:
    """A notebook's first code cell with the shared setup at its top.

    The cell's own imports stay: those of the standard library above the setup, the others, which
    may have to be installed, below it. Raises ``ValueError`` if the cell has no setup to replace.
    """
    tree = ast.parse(source)
    lines = source.splitlines()
    blocks = [node for node in tree.body if isinstance(node, ast.Try) and _is_setup(node)]
    if len(blocks) != 1:
        raise ValueError(f"the first code cell has {len(blocks)} blocks 'try: import tpt_nb'")
    ready = any(line.startswith("tpt_nb.lessons.setup.ready(") for line in lines)
    keep_platform = source.count("platform.") > len(VERSIONS.findall(source))
    standard, others, rest = set(NEEDS), [], []
    for node in tree.body:
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if node is blocks[0]:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom) and _standard(node):
            if text != "import platform" or keep_platform:
                standard.add(text)
        elif isinstance(node, ast.Import | ast.ImportFrom) and not rest:
            others.append(text)
        elif VERSIONS.fullmatch(text):
            rest.append(READY)
            ready = True
        else:
            rest.append(text)
    if not ready:
        rest.append(READY)
    mark = MARK if (repo, ref) == PLACEHOLDER else ""
    block = BLOCK.format(repo=repo, ref=ref, mark=mark)
    own = [text for text in others if "tpt_nb" in text.split()[1]]
    foreign = [text for text in others if text not in own]
    groups = [sorted(standard, key=_import_order), [block.rstrip()], foreign, own, rest]
    return "\n\n".join("\n".join(group) for group in groups if group)


def _is_setup(node: ast.Try) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Import) and first.names[0].name.split(".")[0] == "tpt_nb"


def _standard(node: ast.Import | ast.ImportFrom) -> bool:
    name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
    return name.split(".")[0] in sys.stdlib_module_names


def _import_order(text: str) -> tuple[bool, str]:
    return text.startswith("from "), text  # as ruff sorts them


def stamp(notebook: nbformat.NotebookNode, path: str, repo: str, ref: str) -> None:
    """Badge, setup and metadata of one notebook, in place.

    Raises ``ValueError`` if it has no heading or no setup.
    """
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
