"""Values that answers hand over, compared outside of the sandbox."""

import base64

import numpy as np

MISSING = "no value"


def differs(got: object, expected: dict) -> str:
    """How a value differs from the reference's, or nothing. ``got`` may be anything."""
    if not isinstance(got, dict) or got.get("what") != expected["what"]:
        return MISSING
    if "json" in expected:
        return "" if "json" in got and got["json"] == expected["json"] else "not what it should be"
    shape = expected["shape"]
    if "json" in got:
        return "not a number"
    if got.get("shape") != shape:
        return f"shape {got.get('shape')}, not {shape}"[:200]
    try:
        a = np.frombuffer(base64.b64decode(got["data"], validate=True), "<f8").reshape(shape)
    except (KeyError, TypeError, ValueError):
        return "not a number"
    b = np.frombuffer(base64.b64decode(expected["data"]), "<f8").reshape(shape)
    with np.errstate(invalid="ignore"):  # infinity minus infinity; NaN is no agreement
        worst, atol = float(np.abs(a - b).max(initial=0.0)), float(expected["atol"])
    if worst <= atol:
        return ""
    return f"the largest difference is {worst:.3g}, allowed is {atol:.3g}"
