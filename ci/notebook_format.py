"""What a committed notebook looks like: ``normalise`` makes it so, ``problems`` says what is wrong.

Executed, counted 1..n, without traces of the machine that executed it.
"""

import re
from collections.abc import Mapping

from nbformat import NotebookNode

SIZE = 1_000_000  # bytes of a committed notebook
PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|work|opt|mnt|content|var)/[\w./-]+")
FORBIDDEN = {
    r"^\s*!": "a shell command hangs or fails unseen in headless runs",
    r"^\s*%(?:pip|conda)\s+install(?!.*requirements-colab)": "it may break Colab's torch",
    r"^\s*%tensorboard": "it leaves a process and stores nothing",
    r"\bsys\.exit\(|(?<!\w)(?:exit|quit)\(\)": "it stops a notebook silently",
    r"\bnotebook_login\(|(?<!\w)input\(": "it waits for a person",
    r"\btqdm\.notebook\b": "it stores a widget, not text; use tqdm.auto",
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def is_added(cell: NotebookNode) -> bool:
    """Did papermill add this cell (parameters of a run, a note on an error)?"""
    tags = cell.metadata.get("tags", [])
    return any(tag == "injected-parameters" or tag.startswith("papermill-error") for tag in tags)


def normalise(notebook: NotebookNode, replace: Mapping[str, str] | None = None) -> NotebookNode:
    """Make an executed notebook fit to be committed, in place.

    Widgets (progress bars, explorers' controls) go: without a kernel they are a line of noise.

    Args:
        notebook: as papermill wrote it.
        replace: texts to replace in outputs, such as the path of the repository; the longest first.
    """
    notebook.cells = [cell for cell in notebook.cells if not is_added(cell)]
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.kernelspec = NotebookNode(
        name="python3", display_name="Python 3", language="python"
    )
    notebook.metadata.language_info = NotebookNode(name="python")
    count = 0
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill puts an empty list on every cell
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
            cell.execution_count = count
        shown = [o for o in merge(cell.outputs) if WIDGET not in o.get("data", {})]
        cell.outputs = [tidy(output, count, replace or {}) for output in shown]
    return notebook


def merge(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of one stream: where it was cut depends on the clock."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def tidy(output: NotebookNode, count: int, replace: Mapping[str, str]) -> NotebookNode:
    """An output without the paths to replace."""

    def clean(text: object) -> object:
        if isinstance(text, str):
            for old in sorted(replace, key=len, reverse=True):
                text = text.replace(old, replace[old])
        return text

    if output.output_type == "stream":
        output.text = clean(output.text)
    if "data" in output:
        for kind, text in output.data.items():
            if not kind.startswith("image/"):
                output.data[kind] = clean(text)
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


def problems(notebook: NotebookNode, size: int = 0) -> list[str]:
    """What keeps a notebook from being committed, one line each; nothing if it is fine.

    Args:
        notebook: as read with nbformat.
        size: of its file, in bytes.
    """
    found = []
    if size > SIZE:
        found.append(f"the file has {size} bytes, more than {SIZE}: smaller or fewer figures")
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        found.append("nbformat is older than 4.5: cells have no ids")
    if "widgets" in notebook.metadata or "papermill" in notebook.metadata:
        found.append("metadata of widgets or papermill: run bash ci/run --in-place")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged 'parameters'; papermill needs exactly one")
    count = 0
    for i, cell in enumerate(notebook.cells, 1):
        if is_added(cell):
            found.append(f"cell {i} was added by papermill")
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            if cell.execution_count != count:
                found.append(f"cell {i}: execution count {cell.execution_count}, not {count}")
        if cell.cell_type == "code":
            found += [f"cell {i}: {text}" for text in cell_problems(cell)]
    return found


def cell_problems(cell: NotebookNode) -> list[str]:
    """What is wrong with one code cell and its outputs."""
    found = []
    for pattern, why in FORBIDDEN.items():
        hit = re.search(pattern, cell.source, re.MULTILINE)
        if hit:
            found.append(f"{hit[0].strip()!r} in the source: {why}")
    if "raises-exception" in cell.metadata.get("tags", []):
        found.append("tagged raises-exception, which papermill counts as a failure; use try/except")
    texts = [cell.source]
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"stored an error: {output.ename}")
        data = output.get("data", {})
        texts += [text for kind, text in data.items() if kind.startswith("text/")]
        texts.append(output.get("text", ""))
        if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
            found.append("a picture has no alt text: show it with tpt_nb.figures.show(fig, alt)")
        if "image/svg+xml" in data or "application/pdf" in data:
            found.append("a picture is stored as SVG or PDF, which nbval compares; store PNG")
    for text in texts:
        for path in PATH.findall(text):
            found.append(f"an absolute path: {path}")
    return found
