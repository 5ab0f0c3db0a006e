"""The rooms of tpt_nb: imports go downwards only, files and functions stay small.

The imports are read from the source, those inside functions too.
"""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpt_nb import methods

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "tpt_nb"
ROWS = [  # a room imports from rows above its own; all may use core
    ("core",),
    ("metrics", "figures"),
    ("models", "views", "datasets"),
    ("losses", "features"),
    ("methods",),
    ("runs",),
    ("lessons", "scale"),
    ("course", "__main__"),
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
MODULES = {
    ".".join(p.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES
}
MAX_FILE, MAX_FUNCTION = 350, 60
MAX_FILES = 146  # a ratchet: 112 when the rooms were made, then a file for each method or lesson


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> list[tuple[str, str, int]]:
    """(module, name or "", line) of everything that a file imports from tpt_nb."""
    out = []
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            out += [(a.name, "", node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: imports here are absolute"
            out += [(node.module, a.name, node.lineno) for a in node.names]
    return [entry for entry in out if entry[0].split(".")[0] == "tpt_nb"]


def target(source: str, name: str) -> str:
    """The module that ``from source import name`` leads to."""
    return f"{source}.{name}" if f"{source}.{name}" in MODULES else source


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    here = room(module)
    for source, name, line in imports(module):
        there = room(target(source, name))
        if not there or there == here:
            continue
        assert here, f"tpt_nb/__init__.py imports {there}: it should load nothing"
        assert there == "core" or ROW[there] < ROW[here], (
            f"{module}:{line} imports {there}: {here} may use {ROWS[: ROW[here]]} and core"
        )


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_room(module):
    for source, name, line in imports(module):
        private = [part for part in (*source.split("."), name) if re.match(r"_[a-z]", part)]
        outside = room(target(source, name)) != room(module)
        assert not (private and outside), f"{module}:{line} takes {private[0]} of another room"


def test_no_circles():
    """Neither among modules, nor hidden in functions."""
    arrows = {m: {target(s, n) for s, n, _ in imports(m)} - {m} for m in MODULES}
    for m in arrows:  # importing a.b.c runs a.b first, but a room's own __init__ is no circle
        arrows[m] = {t for t in arrows[m] if not m.startswith(t + ".")}
        if MODULES[m].name == "__init__.py":
            arrows[m] = {t for t in arrows[m] if not t.startswith(m + ".")}
    done: set[str] = set()

    def visit(m: str, path: tuple[str, ...]) -> None:
        assert m not in path, " -> ".join((*path[path.index(m) :], m))
        if m not in done:
            for t in sorted(arrows.get(m, ())):
                visit(t, (*path, m))
            done.add(m)

    for m in arrows:
        visit(m, ())


def test_files_and_functions_are_small():
    long = []
    for module, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        long += [f"{module}: {lines} lines"] if lines > MAX_FILE else []
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                long += [f"{module}.{node.name}: {size} lines"] if size > MAX_FUNCTION else []
    assert not long, long
    assert len(FILES) <= MAX_FILES, len(FILES)


def test_every_room_says_what_it_is():
    for name in ROW:
        path = PACKAGE / name / "__init__.py"
        if path.is_file():
            text = ast.get_docstring(tree(path)) or ""
            assert len(text.splitlines()) >= 3, f"{path.parent.name}: three lines of docstring"
            assert name in ("core", "lessons", "course") or "__all__" in path.read_text(), name


def test_nothing_outside_methods_knows_a_method_by_name():
    """Two names are not looked for: ``vote`` and ``zero`` are words of the language as well."""
    names = set(methods.names()) - {"vote", "zero"}
    found = []
    for module, path in MODULES.items():
        if room(module) in ("methods", "lessons", "course", ""):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{module}:{node.lineno}: {node.value!r}")
    # the default of a configuration and of the planner is the method that the project is named for;
    # "zero_shot" is a key of what evaluate prints, "tpt" a list of AugMix's operations
    allowed = {"tpt_nb.runs.config": {"tpt"}, "tpt_nb.scale.planner": {"tpt"}}
    allowed["tpt_nb.__main__"] = {"tpt", "zero_shot"}
    allowed |= {"tpt_nb.views.augmenters": {"tpt"}, "tpt_nb.views.augmix": {"tpt"}}
    bad = [f for f in found if f.split(": ")[1].strip("'") not in allowed.get(f.split(":")[0], ())]
    assert not bad, bad


def test_nothing_is_guessed():
    """What a function takes is declared, not found out."""
    for module, path in MODULES.items():
        text = path.read_text()
        assert "inspect.signature" not in text, module


def load(*modules: str) -> str:
    """Import these alone, in a fresh interpreter: the heavy libraries that came with them."""
    heavy = (
        "diffusers",
        "transformers",
        "faiss",
        "ray",
        "matplotlib",
        "ot",
        "keybert",
        "tensorboard",
    )
    code = "import sys, importlib\n"
    code += "".join(f"importlib.import_module({m!r})\n" for m in modules)
    code += f"print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, f"{modules}: {done.stderr}"
    return done.stdout.strip()


def test_methods_are_light():
    assert load("tpt_nb.methods") == ""


def test_core_loads_no_torch():
    code = "import sys, tpt_nb, tpt_nb.core.messages, tpt_nb.core.files, tpt_nb.core.command_line\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_module_can_be_imported_alone(module):
    load(module)
