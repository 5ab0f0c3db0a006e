"""What only notebooks need: ``setup`` (first cells), ``check``, ``findings``, ``tables``,
``widgets``.

Never here: ``course``, ``scale``. Notebooks import the modules, which need only what a bare Colab
has. To add an explorer, write a function in ``widgets`` that ends in ``explorer(plot, ...)``; to
say what a table or figure shows, call one of ``findings`` below it.
"""

__all__ = ["check", "findings", "setup", "tables", "widgets"]
