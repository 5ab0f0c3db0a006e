"""The course: student versions of the notebooks, and grading of what comes back (Linux).

Nothing in here may be imported by another room. Another rule of what counts as an answer goes into
``submissions``, another way of isolation into ``sandbox`` and ``inside``.

::

    python -m tpt_nb.course release                # notebooks/student; --out DIR: both versions
    python -m tpt_nb.course grade SUBMISSIONS --out grades.csv --jobs 2

**A master** is a notebook in ``notebooks/``. A code cell with the metadata ``tpt: {q: "02.3",
points: 2}`` is an exercise: its solution stands between ``# BEGIN SOLUTION`` and ``# END
SOLUTION``, and visible checks follow in the same cell. Cells with ``tpt: {q: "02.3", hidden:
true}`` are its hidden tests. They hold no expected value: ``check.report(name, value)`` hands
over what the answer gives for random numbers drawn from ``check.seed()``. A question without
hidden tests is graded with its visible checks, read as ``check.report``. In the student version a
cell tagged ``solution`` is left out, and one tagged ``gives-away`` loses its outputs.

**The kinds.** A letter in the name of a question makes it another kind (``course.kinds``):

- ``02.P``, *predict, then run*. The solution is one line, ``guess = "B"``, which the student gets
  as ``guess = ...``; ``check.predict("02.P", guess, {"A": "...", ...})`` follows. Further down a
  cell tagged ``gives-away`` ends in ``check.reveal("02.P", result, detail)``, which shows the
  result only to who has predicted. Graded as data: one of the options, not run after the result.
- ``02.B``, *find the bug*. Between the solution and ``# END SOLUTION`` stands ``# BUG`` and below
  it the wrong lines, each as a comment. The student gets these and no mark of where they are.
- ``02.T`` and ``02.O``, *read this table* and an open question, are cells of text with ``tpt: {q,
  points}``: the model answer, and the rubric as lines ``- (1) says that ...``, whose points add up.
  The student gets a place to write. Below the heading of ``02.O`` a cell of code to start with.

To add one: the heading ``**Exercise 02.B · title** · difficulty ●●○ · importance ●●○ · 10 minutes``
with a folded hint, the cell below it, for ``B`` a hidden test and a line in ``MISTAKES``
(``ci/tests/test_course_real.py``); then ``release``. ``ci/lint_notebooks.py`` says what is missing.

**Grading.** A submission is read as data. Its cells are what Jupyter makes of them: ``x?``,
``%time`` and ``!ls`` are Python calls. Answers (found by question, by cell id, or by the name of
the function; of several cells those that define it) are put into the master in place of the
solutions; of the master only what answers and tests need is kept, and no solution. nbclient runs
that in a sandbox (``course.sandbox``), with a seed drawn for this grading. The same tests run once
with the reference solutions. Then, outside of the sandbox, value by value: a test passes if the
answer gave what the reference gave. The tests of a question share its points; what is no pass is
worth nothing, and the reason is written down. An answer that ends the run (a loop without end, a
dead kernel) is taken out, and the rest runs again. An answer that calls another answer gets what
that one gives (04.2 calls 04.1): the solution in its place would have to be in the sandbox.

Predictions and texts are read and never run. A text waits for a person: ``grades_rubric.csv`` has
a line for each item of its rubric; filled in, it is added up by the next ``grade``.

**Threat model.** Answers are hostile programs. Trusted are who starts the grading, the masters
and the installed packages.

- *Forging a pass.* Expected values and solutions are never in the sandbox, so nothing in it
  (another ``print``, ``torch.allclose`` or ``tpt_nb``; ``sys.exit``; a forged report) can do more
  than hand over values, and only right values are worth something. More values than tests are
  worth nothing, so guesses are not. The seed is new each time, so values of an earlier run are
  worth nothing.
- *Reading the key or other submissions, telling somebody.* In ``namespaces`` and ``bubblewrap``
  there are Python, its packages, ``tpt_nb``, ``data`` and no network. ``rlimits`` CANNOT prevent
  either, and says so: for answers of people that you trust. The feedback holds up to 300
  characters of an answer's own error message, by which it can tell its author what it saw: in the
  sandbox at most the hidden tests' inputs.
- *Using up the machine.* Time per cell and run, memory, processes, sizes of files, of outputs and
  of reports are limited, and everything that a run started ends with it. The limit on memory is
  one per process; a watch on the sum acts within a fraction of a second.
- *A prediction that was changed after the result.* The notebook's own counts of runs tell only the
  careless: whoever starts anew and edits the guess is believed. It is worth one point.
- *Not covered.* Holes of the operating system's kernel. Answers that call the library's function
  instead of writing it: they are right; the feedback shows them. Copying among students.
"""

from tpt_nb.course.masters import Question, load_master

__all__ = ["Question", "load_master"]
