"""The hidden tests of the real notebooks: the reference passes them, usual mistakes do not."""

from pathlib import Path

import nbformat
import pytest

from tpt_nb.course import grading, masters, sandbox

REPO = Path(__file__).resolve().parents[2]
MISTAKES = {
    "01.1": ("log_p_image.diag()", "log_p_caption.diag()"),  # rows twice
    "01.2": ("F.normalize(t, dim=-1).T", "t.T"),  # one side alone is scaled
    "01.3": ("F.normalize(t, dim=-1).mean", "t.mean"),  # long features outvote short ones
    "01.4": ("[e[:1], ctx, e[1:]]", "[ctx, e]"),  # SOT is not the first
    "01.5": (".sum() / len(cosines)", ".mean()"),
    "01.6": ("(4 * n**2)", "(4 * n)"),
    "02.1": ("-(log_probs", "(log_probs"),
    "02.2": ("int(len(logits) * rho)", "round(len(logits) * rho)"),
    "02.3": (" - math.log(len(selected))", ""),  # not a mean
    "02.4": ("grad / (grad.abs() + eps)", "grad.sign()"),  # only where gradients are large
    "02.5": ("prompts.ctx.clone()", "prompts.ctx"),  # no reset
    "02.6": ("log_probs - log_mean", "log_mean - log_probs"),
    "02.7": ("views[mask]", "views"),  # of all views
}


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02"])
def test_the_reference_passes_and_mistakes_do_not(number, tmp_path):
    (path,) = (REPO / "notebooks").glob(f"{number}_*.ipynb")
    master = masters.load_master(path)
    assert all(question.tests for question in master.questions.values())
    right = masters.solution_version(master)
    wrong = masters.solution_version(master)
    for cell in wrong.cells:
        q = cell.metadata.get("tpt", {}).get("q")
        if q:
            old, new = MISTAKES[q]
            assert old in cell.source
            cell.source = cell.source.replace(old, new)
    for name, notebook in (
        ("right", right),
        ("wrong", wrong),
        ("blank", masters.student_version(master)),
    ):
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    options = grading.Options(sandbox.choose(), cell_seconds=120, limits=sandbox.Limits(600))
    rows, _ = grading.grade(tmp_path, {master.name: master}, options, jobs=2)
    status = {(row.student, row.question): row.status for row in rows}
    for q in master.questions:
        assert status["right", q] == "passed"
        assert status["blank", q] == "blank"
        assert status["wrong", q] in ("failed", "partial"), (q, status["wrong", q])
    points = {total["student"]: total["percent"] for total in grading.totals(rows)}
    assert points["right"] == 100 and points["blank"] == 0
    print([row for row in rows if row.student == "wrong"])
