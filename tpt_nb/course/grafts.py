"""Which cells of a master answers and tests need, and the notebook made of them."""

import ast
import symtable
from collections.abc import Sequence
from dataclasses import dataclass, field

import nbformat
from nbformat import NotebookNode

from tpt_nb.course.masters import Master, Question, parse

OUT_DIR = "out_dir = __import__('os').path.abspath('out')  # the scratch folder of the sandbox"


@dataclass
class Names:
    """The global names that a piece of code has to do with."""

    needs: set[str] = field(default_factory=set)  # must be there before
    binds: set[str] = field(default_factory=set)  # surely bound afterwards
    may_bind: set[str] = field(default_factory=set)  # bound in some branch, too
    changes: set[str] = field(default_factory=set)  # are there before, and are another after
    imports: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)  # needed when a function of it is called


def names_of(source: str) -> Names:
    """What a cell needs, binds and changes. It is read, not run, so this is a good guess."""
    names = Names()
    tree = parse(source)
    _read(tree.body if tree else [], names)
    names.needs |= names.later - names.binds
    return names


def _read(body: Sequence[ast.stmt], names: Names) -> None:
    """Add statements, in their order, to what is known."""
    for node in body:
        if isinstance(node, ast.With | ast.Try):
            for item in getattr(node, "items", []):
                _leaf(ast.Expr(item.context_expr), names)
                if item.optional_vars:
                    _bind(names, item.optional_vars)
            _read(node.body, names)
            for handler in getattr(node, "handlers", []):
                _branch(handler.body, names, {handler.name} - {None})
            _branch(getattr(node, "orelse", []), names)
            _read(getattr(node, "finalbody", []), names)
        elif isinstance(node, ast.For | ast.While | ast.If):
            _leaf(ast.Expr(node.iter if isinstance(node, ast.For) else node.test), names)
            target = _names_in(node.target) if isinstance(node, ast.For) else set()
            _branch(node.body, names, target)
            names.may_bind |= target
            _branch(node.orelse, names)
        else:
            _leaf(node, names)


def _branch(body: Sequence[ast.stmt], names: Names, bound: set[str] = frozenset()) -> None:
    """Statements that may not be run: what they bind is only sure among themselves."""
    inner = Names(binds=names.binds | bound)
    _read(body, inner)
    names.needs |= inner.needs
    names.may_bind |= inner.may_bind
    names.changes |= inner.changes
    names.imports |= inner.imports
    names.later |= inner.later


def _bind(names: Names, target: ast.expr) -> None:
    names.binds |= _names_in(target)
    names.may_bind |= _names_in(target)


def _names_in(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _leaf(node: ast.stmt, names: Names) -> None:
    """Add a statement without statements in it, or the definition of a function or a class."""
    try:
        table = symtable.symtable(ast.unparse(node), "cell", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return
    symbols = table.get_symbols()
    used = _globals(table)
    bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        now = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        now = set().union(*map(_names_in, now)) if now else set()
        names.later |= used - now
        used &= now
    elif isinstance(node, ast.ClassDef):
        used -= bound
    elif isinstance(node, ast.AugAssign):
        used |= bound
    names.needs |= used - names.binds
    names.changes |= _changed(node)
    names.imports |= {s.get_name() for s in symbols if s.is_imported()}
    names.binds |= bound
    names.may_bind |= bound


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Global names that are read in a piece of code, its functions and comprehensions."""
    top = table.get_type() == "module"
    used = {
        s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())
    }
    for child in table.get_children():
        used |= _globals(child)
    return used


def _changed(statement: ast.stmt) -> set[str]:
    """``a`` in ``a.b = ...``, ``a[i] = ...`` and ``a.method(...)`` as a statement."""
    if isinstance(statement, ast.Assign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        targets = [statement.value.func]
    else:
        targets = []
    found = set()
    for target in targets:
        inner = target
        while isinstance(inner, ast.Attribute | ast.Subscript | ast.Call):
            inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and inner is not target:
            found.add(inner.id)
    return found


def needed(sources: Sequence[str], wanted: set[int]) -> list[int]:
    """Indices of the cells to run so that those wanted can run, going back from the last.

    A cell is needed if it binds a name that a later needed cell needs, or changes what such a
    name stands for (modules left out: ``figures.show(...)`` changes nothing).
    """
    names = [names_of(source) for source in sources]
    modules = set().union(*(n.imports for n in names))
    missing: set[str] = set()
    chosen = []
    for i in reversed(range(len(sources))):
        n = names[i]
        if i in wanted or n.may_bind & missing or (n.changes - modules) & missing:
            chosen.append(i)
            missing -= n.binds
            missing |= n.needs
    return chosen[::-1]


class _Reports(ast.NodeTransformer):
    """``check.close(what, got, expected, atol)`` -> ``check.report(what, got, atol)``."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if ast.unparse(node.func) not in ("check.close", "check.equal"):
            return node
        given = dict(zip(("what", "got", "expected", "atol"), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords}
        exact = ast.unparse(node.func) == "check.equal"
        atol = ast.Constant(0) if exact else given.get("atol", ast.Constant(1e-6))
        node.func = ast.parse("check.report", mode="eval").body
        node.args, node.keywords = [given["what"], given["got"], atol], []
        return node


def as_reports(checks: str) -> str:
    """Visible checks as tests that hold no expected value.

    What was computed for expected values alone is left out, so that an answer finds it nowhere.
    """
    tree = _Reports().visit(ast.parse(checks))
    while True:
        used = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        kept = [node for node in tree.body if not _idle(node, used)]
        if len(kept) == len(tree.body):
            return ast.unparse(ast.fix_missing_locations(tree))
        tree.body = kept


def _idle(statement: ast.stmt, used: set[str]) -> bool:
    """Does a statement only assign to names that nobody reads?"""
    if not isinstance(statement, ast.Assign):
        return False
    targets = [node for target in statement.targets for node in ast.walk(target)]
    plain = all(isinstance(node, ast.Name | ast.Tuple | ast.Store) for node in targets)
    return plain and not any(isinstance(node, ast.Name) and node.id in used for node in targets)


def without_checks(source: str, checks: str) -> str:
    """An answer without the visible checks that the student was given."""
    tree, given = parse(source), parse(checks)
    if tree is None or given is None:
        return source
    known = {ast.dump(statement) for statement in given.body}
    lines = source.split("\n")
    for statement in reversed(tree.body):
        if ast.dump(statement) in known or _is_check(statement):
            lines[statement.lineno - 1 : statement.end_lineno] = []
    return "\n".join(lines)


def _is_check(statement: ast.stmt) -> bool:
    """``check.close(...)`` and the like: for the student, not for the grade."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith("check.")


# --- the notebook --------------------------------------------------------------------------------


def graft(master: Master, answers: dict[str, str], level: str = "statements") -> NotebookNode:
    """The part of a master that the tests need, with these answers; no solution is in it.

    Args:
        answers: question -> source. Other questions get their stub and no tests.
        level: what is kept of the master's other cells: the ``statements`` that are needed, the
            ``cells`` that are needed, or ``all``.
    """
    ids, sources, wanted = [], [], set()
    hidden = {test for q in answers for test in master.questions[q].tests}

    def add(ident: str, source: str, want: bool) -> None:
        if want or level == "all":
            wanted.add(len(sources))
        ids.append(ident)
        sources.append(source)

    for cell in master.notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        if cell.cell_type != "code" or (tpt.get("hidden") and cell.id not in hidden):
            continue
        if tpt.get("hidden"):
            add(cell.id, cell.source, True)
        elif "q" in tpt:
            question = master.questions[tpt["q"]]
            given = answers.get(question.id)
            source = without_checks(given or question.stub, question.checks)
            add(cell.id, source, given is not None)
            if given is not None and not question.tests:
                add(test_cells(question)[0], as_reports(question.checks), True)
        else:
            for source in statements(cell.source) if level == "statements" else [cell.source]:
                add(cell.id, source, False)
            if "parameters" in cell.metadata.get("tags", []):
                add(cell.id, OUT_DIR, False)
    cells: dict[str, list[str]] = {}
    for i in needed(sources, wanted):
        cells.setdefault(ids[i], []).append(sources[i])
    notebook = nbformat.v4.new_notebook()
    given = {master.questions[q].cell: {"tpt": {"q": q}} for q in answers}
    notebook.cells = [
        nbformat.v4.new_code_cell("\n".join(parts), id=ident, metadata=given.get(ident, {}))
        for ident, parts in cells.items()
    ]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def statements(source: str) -> list[str]:
    """The statements of a cell; the cell itself if it has magics or cannot be parsed."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return [source]
    lines = source.split("\n")
    pieces = []
    for node in tree.body:
        first = min(d.lineno for d in [node, *getattr(node, "decorator_list", [])])
        pieces.append("\n".join(lines[first - 1 : node.end_lineno]))
    return pieces


def test_cells(question: Question) -> tuple[str, ...]:
    """Ids of the cells that test a question in a grafted notebook."""
    return question.tests or (f"{question.cell}-checks"[-64:],)
