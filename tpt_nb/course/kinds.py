"""The kinds of exercises beside "write this function", told by the letter in their name.

``02.P`` is to be predicted before it is run, ``02.B`` has a bug to be found, ``02.T`` a table to be
read, ``02.O`` a question to be looked into. Here is what the student gets in place of the solution,
and the grading of what is read and not run: predictions (``P``) and texts (``T``, ``O``).
"""

import ast
import re

from nbformat import NotebookNode

KINDS = {"P": "predict, then run", "B": "find the bug", "T": "read this table", "O": "investigate"}
WRITTEN = ("T", "O")  # answered in a cell of text, graded by a person with the rubric
BEGIN = re.compile(r"^(\s*)# BEGIN SOLUTION\s*$")
BUG = re.compile(r"^\s*# BUG\s*$")
END = re.compile(r"^\s*# END SOLUTION\s*$")
COMMENT = re.compile(r"^(\s*)# ?")
VALUE = re.compile(r"^(\w+) = [^=]")  # a solution that is one value, at the left margin
ANSWER = "**Answer {}**"  # begins the student's cell of text
WRITE_HERE = "*Write here, in the place of this line.*"
RUBRIC = re.compile(r"^- \((\d+(?:\.5)?)\) (.+)$", re.MULTILINE)
RESULT = re.compile(r"^Result of (\d\d\.P\d?): (\S+)", re.MULTILINE)


def kind(question: str) -> str:
    """The letter of a question's kind; nothing for "write this function"."""
    letter = question.partition(".")[2][:1]
    return letter if letter in KINDS else ""


def stub(source: str, question: str) -> str:
    """The source of an exercise as the student gets it.

    A text becomes a place to write in. A solution with a ``# BUG`` in it becomes what stands below
    that, without the ``#`` (and ``check.symptom`` goes on top); one that is a value becomes ``name
    = ...``; any other becomes ``raise NotImplementedError``.
    """
    if kind(question) in WRITTEN:
        return f"{ANSWER.format(question)}\n\n{WRITE_HERE}"
    kept, solution, indent = [], None, ""
    for line in source.split("\n"):
        if begin := BEGIN.match(line):
            solution, indent = [], begin[1]
        elif END.match(line):
            kept += _in_place_of(solution, indent, question)
            solution = None
        else:
            (kept if solution is None else solution).append(line)
    if kind(question) == "B":  # the checks show what is wrong, and "Run all" goes on
        kept.insert(0, f'check.symptom("{question}")  # a check below says what is wrong')
    return "\n".join(kept)


def _in_place_of(solution: list[str], indent: str, question: str) -> list[str]:
    bug = next((i for i, line in enumerate(solution) if BUG.match(line)), None)
    if bug is not None:
        return [COMMENT.sub(r"\1", line) for line in solution[bug + 1 :]]
    if not indent and (value := VALUE.match(solution[0])):
        return [f"{value[1]} = ...  # your answer in the place of the dots"]
    unanswered = f'{indent}raise NotImplementedError("exercise {question}")'
    return [f"{indent}# your code here", unanswered]


def solved(source: str) -> str:
    """The source of an exercise with its solution, without the markers and the bug."""
    kept, is_bug = [], False
    for line in source.split("\n"):
        if BUG.match(line):
            is_bug = True
        elif END.match(line):
            is_bug = False
        elif not is_bug and not BEGIN.match(line):
            kept.append(line)
    return "\n".join(kept)


def rubric(source: str) -> list[tuple[float, str]]:
    """Points and what they are for, from lines such as ``- (1) says that ...``."""
    return [(float(points), text.strip()) for points, text in RUBRIC.findall(source)]


# --- predictions: read, not run ------------------------------------------------------------------


def options(source: str) -> list[str]:
    """The answers that a prediction allows: the keys in ``check.predict(question, guess, {…})``.

    Raises:
        ValueError: there is no such call.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check.predict":
            return list(ast.literal_eval(node.args[2]))
    raise ValueError("no check.predict(question, guess, options)")


def calls(source: str, function: str, question: str) -> bool:
    """Does a cell call ``check.predict`` or ``check.reveal`` for this question?"""
    return re.search(rf'check\.{function}\(\s*"{question}"', source) is not None


def guessed(tree: ast.Module | None) -> object:
    """The last value that a cell gives a name at its left margin; None if it is no literal."""
    found = None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign):
            try:
                found = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                found = None
    return found


def results(cells: list[NotebookNode]) -> dict[str, str]:
    """Question -> result, from what ``check.reveal`` printed in a notebook that was executed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    return {q: value for text in texts for q, value in RESULT.findall(text)}


def verdict(guess: object, late: bool, allowed: list[str], result: str) -> tuple[str, str]:
    """Status and reason. A prediction counts that was made before the result, right or wrong."""
    if guess not in allowed:
        wanted = ", ".join(repr(option) for option in allowed)
        return "failed", f"the prediction is {str(guess)[:50]!r}, not one of {wanted}"
    if late:
        return "late", f"{guess!r} was predicted after the result was shown"
    if not result:
        return "passed", f"predicted {guess!r}"
    right = "as predicted" if guess == result else f"predicted was {guess!r}"
    return "passed", f"the result is {result!r}, {right}"
