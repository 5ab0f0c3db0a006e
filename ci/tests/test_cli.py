"""python -m tpt_nb: options, the JSON line, one-line errors."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import BROKEN, CLASSES, PER_CLASS, world  # noqa: F401 (a fixture)

from tpt_nb import __main__ as cli
from tpt_nb import methods, metrics
from tpt_nb.core.command_line import fields_of, parse
from tpt_nb.runs import RunConfig, load_run

REPO = Path(__file__).resolve().parents[2]
FIELDS = [
    "dataset", "model", "method", "n", "failed", "accuracy", "accuracy_ci95", "zero_shot",
    "zero_shot_ci95", "improved", "worsened", "p_value", "seconds_per_image",
]  # fmt: skip


@pytest.fixture
def options(world, tmp_path, monkeypatch) -> list[str]:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return [f"--{key}={value}" for key, value in world.items()]


def evaluate(capsys, *arguments: str) -> tuple[str, dict]:
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_evaluate_ends_with_the_promised_object(options, capsys):
    out, result = evaluate(capsys, *options, "--method", "tpt")
    assert list(result) == FIELDS
    (folder,) = Path("runs").iterdir()
    records = load_run(folder).records
    assert result["n"] == len(records) == len(CLASSES) * PER_CLASS and result["failed"] == 1
    assert result["accuracy"] == metrics.accuracy(records)
    assert result["zero_shot"] == metrics.accuracy(records, "before")
    change = metrics.changes(records)
    assert result["p_value"] == metrics.mcnemar(change["improved"], change["worsened"])
    low, high = result["accuracy_ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert BROKEN in out
    assert evaluate(capsys, *options, "--method", "tpt")[1] == result  # loaded, the same


def test_every_field_is_an_option_in_both_spellings():
    fields = cli.run_fields()

    def parsed(*words: str) -> dict:
        return parse("evaluate", "", fields, words)

    own = {name for method in methods.names() for name in fields_of(methods.get(method).options)}
    assert {f.name for f in dataclasses.fields(RunConfig)} - {"options"} <= set(fields)
    assert {"learning_rate", "selection_p_all", "lambda_q", "order"} <= own <= set(fields)
    for name, (hint, *_) in fields.items():
        for word in {name, name.replace("_", "-")}:
            if hint is bool:
                assert parsed(f"--{word}") == {name: True}
                assert parsed(f"--no-{name}") == {name: False}
            else:
                assert parsed(f"--{word}", "1") == {name: parsed(f"--{name}=1")[name]}
    assert parsed() == {} and RunConfig.from_dict({}) == RunConfig()
    assert parsed("--reduced-size", "none") == {"reduced_size": None}


def test_help_is_quick_and_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0 and "--" in capsys.readouterr().out


def test_compare(options, capsys):
    for seed in ("0", "1"):
        evaluate(capsys, *options, "--seed", seed, "--n_aug=3")
    evaluate(capsys, *options, "--reduced-size=20", "--n_aug=3")
    names = sorted(path.name for path in Path("runs").iterdir())
    a, b = (
        next(n for n in names if "size" not in n and ("seed=1" in n) is s) for s in (False, True)
    )
    assert cli.main(["compare", a, f"runs/{b}", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    want = metrics.compare(load_run(f"runs/{a}").records, load_run(f"runs/{b}").records)
    assert result == {"a": a, "b": b, **want}
    assert f"{100 * want['gain']:+.2f} points" in out and "left out" not in out
    small = next(n for n in names if "size=20" in n)
    assert cli.main(["compare", a, small]) == 0
    assert re.search(r"left out: 3\d images only in a, 0 only in b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "--loss", "marginl"], "unknown loss 'marginl'"),
        (["evaluate", "--method", "tptt"], "did you mean 'tpt'"),
        (["evaluate", "--profile", "ful"], "did you mean 'full'"),
        (["evaluate", "--selection_p_all", "2"], "selection_p_all is 2.0"),
        (["evaluate", "--selection-p-all", "0"], "selection_p_all is 0.0"),
        (["evaluate", "--lerning-rate", "2"], "did you mean '--learning_rate'"),
        (["evaluate", "--n_aug", "many"], "invalid int value: 'many'"),
        (["evaluate", "--dataset", "iconshift-z"], "unknown data set 'iconshift-z'"),
        (["evaluate", "--dataset", "folder", "--root", "/nowhere"], "/nowhere"),
        (["evaluate", "--coop", "/nowhere.pth"], "/nowhere.pth"),
        (["compare", "one"], "RUN"),
        (["compare", "one", "two"], "no run 'one'"),
        (["evaluat"], "evaluat"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, world, arguments, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    if "evaluate" in arguments:
        arguments = [arguments[0], "--model", world["model"], *arguments[1:]]
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_mistake_from_a_shell_has_no_traceback():
    command = [sys.executable, "-m", "tpt_nb", "evaluate", "--exact", "roughly"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and "unknown exact 'roughly'" in done.stderr


def test_comparing_runs_over_other_images_is_refused(options, capsys, tmp_path, world):  # noqa: F811
    import shutil

    evaluate(capsys, *options, "--method=zero_shot")
    shutil.copytree(world["root"], tmp_path / "other")
    (tmp_path / "other" / "star" / "0.png").unlink()
    evaluate(capsys, *options, "--method=zero_shot", "--root", str(tmp_path / "other"))
    a, b = Path("runs").iterdir()
    assert cli.main(["compare", a.name, b.name]) == 2
    assert "different data" in capsys.readouterr().err
