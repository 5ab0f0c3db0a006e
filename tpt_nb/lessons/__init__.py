"""What only notebooks need: ``setup`` (first cells), ``check`` (exercises), ``widgets``.

Never here: ``course``, ``scale``. Notebooks import the modules, which need only what a bare Colab
has. To add an explorer, write a function in ``widgets`` that ends in ``explorer(plot, ...)``.
"""

__all__ = ["check", "setup", "widgets"]
