"""Checks in exercises: one line if it is right, else what was expected and what came.

``close`` and ``equal`` are the visible checks beside an answer. ``report`` is for hidden tests: it
holds no expected value, but hands over what the answer gives, and the grader (``tpt_nb.course``)
compares that with what the reference solution gives for the same random numbers (``seed``).
"""

import base64
import os
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
        raise AssertionError(f"{what}: expected shape {list(b.shape)}, got {list(a.shape)}.")
    worst = float(np.abs(a - b).max(initial=0.0))
    if not worst <= atol:  # also for NaN
        raise AssertionError(
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
        raise AssertionError(f"{what}: expected {b!r}, got {a!r}.")
    print(f"{what}: correct")


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
