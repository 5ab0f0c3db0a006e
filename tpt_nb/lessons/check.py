"""Checks in exercises: one line if it is right, else what was expected and what came.

``predict`` keeps what a student expects, and ``reveal`` shows a result to who has said so.
``close`` and ``equal`` are the visible checks beside an answer. ``report`` is for hidden tests: it
holds no expected value, but hands over what the answer gives, and the grader (``tpt_nb.course``)
compares that with what the reference solution gives for the same random numbers (``seed``).
"""

import ast
import base64
import os
import re
import sys

import numpy as np

MIME = "application/vnd.tpt.value+json"
SEED = "TPT_NB_GRADING_SEED"


def close(what: str, got, expected, atol: float = 1e-6) -> None:
    """Check numbers or tensors; print one line if they agree.

    Args:
        what: name of the thing in the message.
        got, expected: numbers, arrays or tensors of the same shape.
        atol: largest absolute difference that still counts as agreement.
    Raises:
        AssertionError: says what was expected, what came and the largest difference.
    """
    a, b = _array(what, got), _array("expected", expected)
    if a.shape != b.shape:
        return _fail(f"{what}: expected shape {list(b.shape)}, got {list(a.shape)}.")
    worst = float(np.abs(a - b).max(initial=0.0))
    if not worst <= atol:  # also for NaN
        return _fail(
            f"{what}: expected {_short(b)}, got {_short(a)}; the largest difference is "
            f"{worst:.3g}, allowed is {atol:.3g}."
        )
    print(f"{what}: correct")


def equal(what: str, got, expected) -> None:
    """Check things that must be the same (a list of indices, a name); print one line if they are.

    Raises:
        AssertionError: says what was expected and what came.
    """
    a, b = (getattr(x, "tolist", lambda x=x: x)() for x in (got, expected))
    if a != b:
        return _fail(f"{what}: expected {b!r}, got {a!r}.")
    print(f"{what}: correct")


_BUGGY: set[str] = set()  # exercises whose cell is running, with a bug that is known


def symptom(question: str) -> None:
    """In the rest of this cell a check that fails says so and does not stop the notebook.

    For code with a bug to be found; a notebook's own cells never call it.
    """
    _BUGGY.add(question)


def _fail(message: str) -> None:
    if not _BUGGY:
        raise AssertionError(message)
    print(f"NOT RIGHT YET: {message}")


def seed() -> int:
    """Seed of the random numbers in hidden tests: another one whenever answers are graded, else 0.

    At most 2^31 - 1, so that every generator takes it.
    """
    return int(os.environ.get(SEED, 0))


def report(what: str, got, atol: float = 1e-5) -> None:
    """Hand a value to the grader; only says so in a notebook that is not being graded.

    Args:
        what: name of the test, as the feedback shows it.
        got: numbers, an array, a tensor or a (nested) list of them: compared within ``atol``;
            anything else that JSON has (text, a dictionary): must be the same.
        atol: largest absolute difference that still counts as agreement; 0: the same.
    Raises:
        AssertionError: it is None.
    """
    value = {"what": what, "atol": atol}
    try:
        array = _array(what, got)
    except (TypeError, ValueError):
        value["json"] = got
    else:
        data = base64.b64encode(array.astype("<f8").tobytes()).decode()
        value |= {"shape": list(array.shape), "data": data}
    if SEED not in os.environ:
        print(f"hidden test, {what}: handed over")
        return
    from IPython.display import display

    display({MIME: value, "text/plain": what}, raw=True)


# --- predictions ---------------------------------------------------------------------------------

_GUESSES: dict[str, str] = {}  # question -> what was predicted
_SHOWN: dict[str, str] = {}  # question -> what was predicted when the result was shown


def predict(question: str, guess: str, options: dict[str, str]) -> None:
    """Keep a prediction, to be compared with the result by :func:`reveal`.

    Args:
        question: such as "02.P".
        guess: one of the options; ``...`` is none.
        options: what can be predicted -> what it means.
    Raises:
        AssertionError: it is not one of them.
        NotImplementedError: nothing is predicted yet.
    """
    if guess is ...:
        raise NotImplementedError(f"exercise {question}")
    if guess not in options:
        wanted = ", ".join(map(repr, options))
        raise AssertionError(f"{question}: expected one of {wanted}, got {guess!r}.")
    if _SHOWN.get(question, guess) != guess:
        first = _SHOWN[question]
        print(f"{question}: you have seen the result; what you predicted is {first}.")
        return
    _GUESSES[question] = guess
    print(f"{question}: you predict {guess} ({options[guess]}). Now run on.")


def reveal(question: str, result: str, detail: str = "") -> None:
    """Compare a result with what was predicted; shows nothing to who has predicted nothing.

    Args:
        question: such as "02.P".
        result: which of the options it is.
        detail: the measurement behind it.
    """
    if question not in _GUESSES:
        print(f"First predict (exercise {question}, above), then run this cell again.")
        return
    guess = _SHOWN[question] = _GUESSES[question]
    print(f"Result of {question}: {result}" + (f" ({detail})" if detail else ""))
    right = "That is what you predicted." if guess == result else f"You predicted {guess}. Why?"
    print(right)


_LOST: dict[str, str] = {}  # name -> the exercise for want of which its cell stopped


def go_on(shell) -> None:
    """Let "Run all" pass an exercise without answer: one line in the place of an error.

    The same for a later cell that needs a name which a cell would have bound had it not stopped. A
    dict or list that such a cell was filling is half full and goes.

    Args:
        shell: IPython's, or None outside of it.
    """
    if shell is None:
        return

    def say(shell, kind, error, trace, tb_offset=None) -> None:
        if question := _wanted(error):
            print(f"Exercise {question} is not answered yet.")
        else:
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    def forgive(result) -> None:
        _BUGGY.clear()
        if question := _wanted(result.error_in_exec):
            tree = ast.parse(shell.transform_cell(result.info.raw_cell))
            named = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
            names = {n.id for n in named if isinstance(n.ctx, ast.Store)}
            names |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            if question not in result.info.raw_cell:  # the exercise's own cell leaves what it has
                for name in names:
                    if isinstance(shell.user_ns.get(name), dict | list | set):
                        del shell.user_ns[name]
            _LOST.update(dict.fromkeys(names - shell.user_ns.keys(), question))
            result.error_in_exec = None  # what makes a front end stop

    shell.set_custom_exc((NotImplementedError, NameError), say)
    shell.events.register("post_run_cell", forgive)


def _wanted(error: BaseException | None) -> str:
    """The open exercise behind an error, such as "02.B"; "" if there is none."""
    if isinstance(error, NotImplementedError):
        stub = re.fullmatch(r"exercise (\d\d\.\w+)", str(error))
        return stub[1] if stub else ""
    return _LOST.get(error.name, "") if isinstance(error, NameError) else ""


def _array(what: str, value) -> np.ndarray:
    if value is None:
        raise AssertionError(f"{what}: got None; does the function return its result?")
    torch = sys.modules.get("torch")  # a tensor needs it; importing it for a number takes seconds
    if torch and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    elif torch and isinstance(value, list | tuple):
        value = [v.detach().cpu() if isinstance(v, torch.Tensor) else v for v in value]
    return np.asarray(value, dtype=np.float64)


def _short(value: np.ndarray) -> str:
    text = np.array2string(value, precision=4, threshold=8, edgeitems=3, separator=", ")
    return " ".join(text.split())
