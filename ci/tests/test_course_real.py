"""The hidden tests of the real notebooks: the reference passes them, usual mistakes do not."""

import secrets
from pathlib import Path

import nbformat
import pytest

from tpt_nb.course import execution, feedback, grading, kinds, masters, sandbox, submissions, values
from tpt_nb.course.cells import parse
from tpt_nb.lessons import check

REPO = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MISTAKES = {
    "00.1": (
        "share * source_var + (1 - share) * variance",
        "(share * source_var.sqrt() + (1 - share) * variance.sqrt()) ** 2",
    ),
    "00.2": ("rank[targets[images]].argsort", "targets[images].argsort"),  # the classes in order
    "00.3": ("(together - alone).abs().max() < atol and ", ""),  # the batch's mean has no order
    "00.4": ("(log_p + h)", "log_p"),
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
    "02.7": ("f[mask]", "f"),  # of all views
    "03.1": ("[j * w, i * h, (j + 1) * w,", "[i * w, j * h, (i + 1) * w,"),  # by columns
    "03.2": ("along_one_axis**2", "along_one_axis"),
    "03.3": ("(patches + 1) * (n_aug + 1)", "patches * (n_aug + 1)"),  # the image is a group, too
    "03.4": ("in keep_confident(logits)]", "in logits]"),
    "03.5": ("len(E) / (1 / E).sum()", "E.mean()"),
    "03.6": ("losses.entropy(weight * p.log())", "weight * h"),
    "03.7": ("max(largest, (len(p) - rank) * p[i])", "(len(p) - rank) * p[i]"),  # out of order
    "03.8": (" / adjacent.sum(dim=1)", ""),  # many neighbours count more
    "04.1": ("(i + 1 + overlap) / n", "(i + 1) / n"),
    "04.2": ("min(w, h) for w", "(w * h) ** 0.5 for w"),
    "04.3": ("2 / 3 * (high**1.5 - low**1.5) / (high - low)", "((low + high) / 2) ** 0.5"),
    "04.4": (
        "(1 - weight) * right[upper - 1] + weight",
        "weight * right[upper - 1] + (1 - weight)",
    ),
    "04.5": ("/ resamples", "/ len(right)"),
    "05.1": ("best / best.sum()", "best"),
    "05.2": ("largest - 1, largest", "0.0, largest"),
    "05.3": ("p * (v - (p * v).sum())", "v"),  # of the first softmax alone
    "05.4": ("losses.log_mean_prob(logits[chosen])", "logits[chosen].mean(0)"),
    "05.5": (" - gain**2", ""),
    "06.1": ("(1 - a).sqrt()", "(1 - a)"),
    "06.2": ("- (1 - a).sqrt() * v", "+ (1 - a).sqrt() * v"),
    "06.3": ("else 1", "else 0"),  # the original has to pass, too
    "06.4": ("n_views * per_view", "per_view"),
    "06.5": ("int(targets.bincount().max())", "1"),  # mostly another image of the same class
    "07.1": ("caption[:start] + name + caption[end:]", "caption.replace(caption[start:end], name)"),
    "07.2": (" - count) / (count * (count - 1))", ") / count**2"),  # with the diagonal
    "07.3": (".amax(-1)", ".mean(-1)"),
    "07.4": (
        "second.softmax(1).gather(1, index) > first.softmax(1)",
        "second.gather(1, index) > first",
    ),
    "08.1": ("torch.quantile(cosines, q, dim=0)", "cosines.mean(0)"),
    "08.2": ("torch.cat([a, -b])[order]", "torch.cat([a, -b])"),
    "08.3": ("w0 / (w0 + wr)", "wr / (w0 + wr)"),
    "08.4": (".softmax(-1).mean(1)", ".mean(1).softmax(-1)"),
    "09.1": ("1 + M + sum(", "sum("),  # the prefix is computed, too
    "09.2": (".triu(1)", ".triu(0).tril(-1)"),  # no mask
    "09.3": ("scale * g_logits.T @ f", "g_logits.T @ f"),
    "09.4": ("(1 - lr * weight_decay) * ctx", "ctx"),
    "09.5": ("24 * d**2", "12 * d**2"),  # multiplications alone
    "10.1": ("counts + 1e-3 * kept.softmax(-1).mean(1)", "counts"),  # ties: the first class
    "10.2": (" / len(logits)", ""),
    "10.3": (".softmax(-1).square().sum(1)", ".softmax(-1).sum(1)"),
    "10.4": (
        "difference[rng.integers(0, n_images, (resamples, n_images))].mean(1)",
        "(y[rng.integers(0, n_images, (resamples, n_images))].mean(1)"
        " - x[rng.integers(0, n_images, (resamples, n_images))].mean(1))",
    ),  # not paired
    "10.5": (".pow(3)", ""),
}
BUGS = {  # question -> a mend that is wrong, one that is right; the bug itself is its stub
    "00.B": (
        ("optimizer.state.clear()", 'optimizer.param_groups[0]["momentum"] = 0'),
        ("optimizer.state.clear()", "for w in tuned: optimizer.state.pop(w, None)"),
    ),
    "01.B": (
        ("columns = list(allowed)", "columns = list(allowed)[::-1]"),
        ("columns = list(allowed)", "columns = allowed = sorted(allowed)"),
    ),
    "02.B": (
        ("        optimizer.zero_grad()\n", ""),  # gradients add up
        (
            "optimizer = torch.optim.AdamW([ctx], lr=lr)\n        opt",
            "optimizer.state.clear()\n        opt",
        ),
    ),
    "03.B": (
        ("logits.view(groups, n, -1)", "logits.view(groups, n, -1).flip(0)"),
        ("logits.view(groups, n, -1)", "torch.stack(logits.split(n))"),
    ),
    "04.B": (
        ("p[:, :count]", "p[:, -count:]"),  # not the first
        ("[:, -keep:]", "[:, ::-1][:, :keep]"),
    ),
    "05.B": (
        ("means.log()", "means.log().softmax(-1)"),
        (
            "losses.entropy(means.log())",
            "-(means * means.clamp_min(1e-30).log()).sum(dim=-1)",
        ),
    ),
    "06.B": (
        (".cumprod(dim=0)[t]", ".cumprod(dim=0)[max(t - 1, 0)]"),
        ("(1 - betas).cumprod(dim=0)[t]", "(1 - betas)[: t + 1].prod()"),
    ),
    "07.B": (("order.roll(1)", "order"), ("order.roll(1)", "order.roll(-1)")),
    "08.B": (
        ("ids[i] != query_id", "i != order[0]"),
        ("[:k]", "[: max(k, 0)]"),
    ),
    "09.B": (
        ("(tuple(names), ctx", "(frozenset(names), ctx"),  # the order of the classes counts
        ("ctx.detach().cpu().numpy().tobytes()", "tuple(ctx.flatten().tolist())"),
    ),
    "10.B": (
        ("right[:, dev]", "right[:, ~dev]"),
        ("right[:, dev].mean(axis=1).argmax()", "np.argmax([r[dev].mean() for r in right])"),
    ),
}


def master_of(number: str) -> masters.Master:
    (path,) = (REPO / "notebooks").glob(f"{number}_*.ipynb")
    return masters.load_master(path)


def values_of(notebook: nbformat.NotebookNode, monkeypatch, left_out=()) -> dict[str, list[dict]]:
    """What each cell of a grafted notebook hands over. It runs here: it is our own code."""
    given: list[dict] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: given.append(data[check.MIME]))
    names, found = {"__name__": "__main__"}, {}
    for cell in notebook.cells:
        if cell.id in left_out:
            continue
        exec(compile(cell.source, cell.id, "exec"), names)
        found[cell.id], given[:] = list(given), []
    return found


@pytest.mark.parametrize("number", sorted({q[:2] for q in MISTAKES}))
def test_what_is_run_of_a_solution_notebook_is_what_is_run_of_the_master(number, tmp_path):
    master = master_of(number)
    right = solutions_of(master)
    nbformat.write(masters.version(master, "solution"), tmp_path / "x.ipynb")
    one = submissions.read_submission("x", tmp_path / "x.ipynb", {master.name: master})
    found = {q: submissions.find_answer(master, q, one.cells).source for q in right}
    assert found == right
    asking = {q: f"files = !ls\n{source}\ntorch.softmax?" for q, source in right.items()}
    ids = [[c.id for c in execution.graft(master, answers).cells] for answers in (right, asking)]
    assert set(ids[0]) <= set(ids[1])  # a tree, so nothing that it needs is dropped


@pytest.mark.parametrize("number", sorted({q[:2] for q in MISTAKES}))
def test_hidden_tests_tell_mistakes_from_answers(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(check.SEED, str(secrets.randbelow(2**31)))  # another one for each grading
    master = master_of(number)
    right = solutions_of(master)
    reference, again = (values_of(execution.graft(master, right), monkeypatch) for _ in range(2))
    for q, solution in right.items():
        question = master.questions[q]
        assert question.tests, q
        wrong, mends = [replaced(solution, *MISTAKES[q])] if q in MISTAKES else [question.stub], []
        if q in BUGS:
            wrong.append(replaced(solution, *BUGS[q][0]))
            mends.append(replaced(solution, *BUGS[q][1]))
        others = {c for r in right if r != q for c in execution.test_cells(master.questions[r])}
        for answer in (*wrong, *mends):
            got = values_of(execution.graft(master, right | {q: answer}), monkeypatch, others)
            problems = []
            for cell in execution.test_cells(question):
                assert len(reference[cell]) == len(got[cell]) > 0
                for value, same, other in zip(reference[cell], again[cell], got[cell], strict=True):
                    assert values.differs(same, value) == "", q
                    problems.append(values.differs(other, value))
            if answer in mends:
                assert not any(problems), f"{q}: a right mend does not pass: {problems}"
            else:
                assert any(problems), f"{q}: the hidden tests do not notice\n{answer}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_read_and_not_run_can_be_graded(path):
    master = masters.load_master(path)
    for q, question in master.questions.items():
        if kinds.kind(q) in kinds.WRITTEN:
            assert len(question.rubric) >= 3, q
        elif kinds.kind(q) == "P":
            options = kinds.options(question.source)
            assert len(options) >= 3 and kinds.guessed(parse(question.solution)) in options, q
            assert kinds.guessed(parse(question.stub)) not in options, q
            assert question.result in ("", *options), q  # "": not executed since


def solutions_of(master: masters.Master) -> dict[str, str]:
    """What is run: question -> solution."""
    return {q: question.solution for q, question in master.questions.items() if question.is_run}


def replaced(source: str, old: str, new: str) -> str:
    """A source with a mistake put in."""
    assert old in source, old
    return source.replace(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02", "10"])  # those that need the model
def test_the_reference_passes_and_mistakes_do_not(number, tmp_path):
    master = master_of(number)
    right = masters.version(master, "solution")
    wrong = masters.version(master, "solution")
    for cell in wrong.cells:
        q = cell.metadata.get("tpt", {}).get("q")
        if q in MISTAKES or q in BUGS:
            cell.source = replaced(cell.source, *(MISTAKES.get(q) or BUGS[q][0]))
    for name, notebook in (
        ("right", right),
        ("wrong", wrong),
        ("blank", masters.version(master, "student")),
    ):
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    options = execution.Options(sandbox.choose(), cell_seconds=120, limits=sandbox.Limits(600))
    rows, _ = grading.grade(tmp_path, {master.name: master}, options, jobs=2)
    status = {(row.student, row.question): row.status for row in rows}
    for q, question in master.questions.items():
        assert status["right", q] == (grading.WAITS if question.rubric else "passed")
        assert status["blank", q] == "blank"
        if not question.is_run:
            continue
        assert status["wrong", q] in ("failed", "partial"), (q, status["wrong", q])
    points = {
        total["student"]: total["percent"] for total in feedback.totals(rows).to_dict("records")
    }
    assert points["right"] == 100 and points["blank"] == 0
