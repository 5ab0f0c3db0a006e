"""Cells as Python: what Jupyter makes of them, the names they need and bind, the checks in them."""

import ast
import symtable
from collections.abc import Sequence
from dataclasses import dataclass, field

from IPython.core.inputtransformer2 import TransformerManager

BODY = ("%%time", "%%timeit", "%%capture", "%%prun")  # these run what stands below them as Python
LOOPS = (ast.For, ast.AsyncFor)
WITHS = (ast.With, ast.AsyncWith)
COMPOUND = (*LOOPS, *WITHS, ast.While, ast.If, ast.Try, ast.TryStar, ast.Match)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def python(source: str) -> str:
    """The Python that Jupyter runs for a cell: ``x?``, ``%magic``, ``!shell`` become calls."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")  # as an editor on Windows writes it
    head, _, body = source.lstrip().partition("\n")
    if head.startswith(BODY):
        return python(body)
    try:
        return TransformerManager().transform_cell(source)
    except Exception:  # not even its tokens can be read
        return source


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a cell; None if it has none."""
    try:
        return ast.parse(python(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def statements(source: str) -> list[tuple[ast.stmt, str]]:
    """The statements of a cell, each with its text; none if it has no syntax tree."""
    tree, code = parse(source), python(source)
    for node in tree.body if tree else ():
        if getattr(node, "decorator_list", ()):
            node.lineno, node.col_offset = node.decorator_list[0].lineno, 0
    return [(node, ast.get_source_segment(code, node)) for node in tree.body] if tree else []


def pieces(source: str) -> list[str]:
    """The texts of a cell's statements; the cell itself if it has no syntax tree."""
    return [text for _, text in statements(source)] or [source]


@dataclass
class Names:
    """The global names that a piece of code has to do with."""

    needs: set[str] = field(default_factory=set)  # must be there before
    binds: set[str] = field(default_factory=set)  # surely bound afterwards
    may_bind: set[str] = field(default_factory=set)  # bound in some branch, too
    changes: set[str] = field(default_factory=set)  # are there before, and are another after
    imports: set[str] = field(default_factory=set)


def names_of(source: str) -> Names:
    """What a cell needs, binds and changes. It is read, not run: a guess, rather too much."""
    names, later = Names(), set()  # later: needed when a function of it is called
    tree = parse(source)
    for node in tree.body if tree else ():
        used, bound, imported = _symbols(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            now = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            now = set().union(*map(_names_in, now))
            later |= used - now
            used &= now
        elif isinstance(node, ast.ClassDef):
            used -= bound
        elif isinstance(node, ast.AugAssign):
            used |= bound
        elif isinstance(node, COMPOUND):
            used -= _targets(node)
        names.needs |= used - names.binds
        names.may_bind |= bound
        names.imports |= imported
        if not isinstance(node, COMPOUND) or isinstance(node, WITHS):
            names.binds |= bound
        if not isinstance(node, DEFINITIONS):
            names.changes |= set().union(*map(_changed, ast.walk(node)))
    names.needs |= later - names.binds
    return names


def _symbols(node: ast.stmt) -> tuple[set[str], set[str], set[str]]:
    """Global names that a statement reads, binds, imports."""
    try:
        table = symtable.symtable(ast.unparse(node), "cell", "exec")
    except (SyntaxError, ValueError, RecursionError):  # await outside of a function, say
        found = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        return _names_in(node), {n.id for n in found if isinstance(n.ctx, ast.Store)}, set()
    symbols = table.get_symbols()
    imported = {s.get_name() for s in symbols if s.is_imported()}
    return _globals(table), imported | {s.get_name() for s in symbols if s.is_assigned()}, imported


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Global names that are read in a piece of code, its functions and comprehensions."""
    top = table.get_type() == "module"
    symbols = [s for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())]
    return {s.get_name() for s in symbols}.union(*map(_globals, table.get_children()))


def _names_in(node: ast.AST | None) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node else set()


def _targets(node: ast.stmt) -> set[str]:
    """What the head of a compound statement binds before anything in its body can read it."""
    if isinstance(node, LOOPS):
        return _names_in(node.target) - _names_in(node.iter)
    items = getattr(node, "items", [])
    bound = set().union(*(_names_in(item.optional_vars) for item in items))
    bound -= set().union(*(_names_in(item.context_expr) for item in items))
    return bound | {handler.name for handler in getattr(node, "handlers", [])}


def _changed(node: ast.AST) -> set[str]:
    """``a`` in ``a.b = ...``, ``a[i] = ...`` and ``a.method(...)`` as a statement."""
    targets = getattr(node, "targets", []) if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AugAssign):
        targets = [node.target]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        targets = [node.value.func]
    found = set()
    for target in targets:
        inner = target
        while isinstance(inner, ast.Attribute | ast.Subscript | ast.Call):
            inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and inner is not target:
            found.add(inner.id)
    return found


def needed(sources: Sequence[str], wanted: set[int]) -> list[int]:
    """Indices of the pieces to run so that those wanted can run, going back from the last.

    One is needed if it binds a name that a later needed one needs, or changes what such a name
    stands for (modules left out: ``figures.show(...)`` changes nothing).
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


def defined(source: str) -> set[str]:
    """Names of the functions and classes that a cell defines."""
    return {node.name for node, _ in statements(source) if isinstance(node, DEFINITIONS)}


# --- visible checks ------------------------------------------------------------------------------


def own_statements(source: str, checks: str) -> list[tuple[ast.stmt, str, bool]]:
    """An answer's statements but ``check.…``: the node, its text, and is it the student's own?"""
    given = {ast.dump(node) for node, _ in statements(checks)}
    return [
        (node, text, ast.dump(node) not in given)
        for node, text in statements(source)
        if not (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func).startswith("check.")
        )
    ]


def without_checks(source: str, checks: str) -> str:
    """An answer without the visible checks that the student was given; what stands there for the
    checks alone goes, too."""
    found = own_statements(source, checks)
    own = {i for i, (_, _, is_own) in enumerate(found) if is_own}
    kept = needed([text for _, text, _ in found], own)
    return "\n".join(found[i][1] for i in kept) if parse(source) else source


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
        func = ast.parse("check.report", mode="eval").body
        return ast.Call(func, [given["what"], given["got"], atol], [])


def as_reports(checks: str) -> str:
    """Visible checks as tests that hold no expected value.

    What was computed for expected values alone is left out, so that an answer finds it nowhere.
    """
    tree = _Reports().visit(ast.parse(checks))
    texts = [ast.unparse(node) for node in tree.body]
    tests = {i for i, text in enumerate(texts) if "check.report(" in text}
    return "\n".join(texts[i] for i in needed(texts, tests))
