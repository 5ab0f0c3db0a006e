"""The methods of test-time adaptation, one file each, and their table.

Imports models, views, datasets, losses and features; never runs, which finds a method by its name.
To add one: a file that ends in ``METHOD = Method(...)``, and one line in ``registry.METHODS``.
"""

from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    as_mask,
    initial_logits,
    option,
    read_options,
)
from tpt_nb.methods.registry import get, names, register, translate

__all__ = [
    "Adapted",
    "Method",
    "Prepared",
    "Setting",
    "as_mask",
    "get",
    "initial_logits",
    "names",
    "option",
    "read_options",
    "register",
    "translate",
]
