"""Immediate checks of exercises: one line if it is right, else what was expected and what came."""

import numpy as np
import torch


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
    a, b = (x.tolist() if hasattr(x, "tolist") else x for x in (got, expected))
    if a != b:
        raise AssertionError(f"{what}: expected {b!r}, got {a!r}.")
    print(f"{what}: correct")


def _array(what: str, value) -> np.ndarray:
    if value is None:
        raise AssertionError(f"{what}: got None; does the function return its result?")
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return np.asarray(value, dtype=np.float64)


def _short(value: np.ndarray) -> str:
    text = np.array2string(value, precision=4, threshold=8, edgeitems=3, separator=", ")
    return " ".join(text.split())
