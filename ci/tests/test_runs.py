"""runs: configurations, names, records, and what is left after a kill -9.

The world of these tests is small and real: a folder of generated pictures, one of them damaged, and
a tiny CLIP with random weights in MiniCLIP's file format.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tpt_nb import losses, metrics, models, runs
from tpt_nb import methods as registry
from tpt_nb.core import machine, messages
from tpt_nb.runs import RunConfig, engine, profile, run
from tpt_nb.runs import config as config_module
from tpt_nb.runs import records as records_module

REPO = Path(__file__).resolve().parents[2]
CLASSES = ["circle", "cross", "disc", "square", "star", "stripe"]
PER_CLASS = 9
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 8, "head_width": 64, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "quick_gelu": True,
}
BROKEN = "disc/broken.png"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict:
    """A root of images, a checkpoint and a CoOp context; the keys are parameters of a run."""
    place = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (place / "images" / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((48, 40), Image.Resampling.NEAREST)
            picture.save(place / "images" / name / f"{i}.png")
    (place / "images" / BROKEN).write_bytes(b"\x89PNG not really")
    model = models.build_mini(0, TINY)
    torch.nn.init.normal_(model.text_projection, std=0.5)  # else the classes hardly differ
    tokens = open_clip.get_tokenizer("RN50")([f"a photo of a {c}." for c in CLASSES])
    models.save_mini(model, tokens.flatten().tolist(), place / "tiny.safetensors")
    models.save_coop(place / "coop.pth.tar", torch.randn(4, 64) * 0.02, epoch=1)
    return {
        "dataset": "folder",
        "root": str(place / "images"),
        "model": str(place / "tiny.safetensors"),
        "n_aug": 7,
        "selection_p_all": 0.3,
        "device": "cpu",
        "workers": 0,
        "cache": str(place / "cache"),
    }


@pytest.fixture
def config(world, tmp_path, monkeypatch) -> RunConfig:
    for module in (config_module, engine):
        monkeypatch.setattr(module, "GROUP", 8)
    return RunConfig.from_dict(world | {"out": str(tmp_path / "runs")})


def one_run(config: RunConfig, **changes) -> runs.Run:
    return run(config.replace(**changes), progress=False)


# --- killing -------------------------------------------------------------------------------------


def child(config: RunConfig, kill: tuple | None) -> None:
    """One run in a process of its own that sends itself SIGKILL at a chosen point."""
    torch.set_num_threads(1)
    config_module.GROUP = engine.GROUP = 8
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    what, when = kill or ("never", 0)
    count = 0

    def after(function):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count > when:
                die()
            return function(*args, **kwargs)

        return counted

    class Torn:
        """A file that dies when its size would pass ``when`` bytes, just there."""

        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115
            self.room = when - Path(path).stat().st_size

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def flush(self):
            self.file.flush()

        def write(self, data):
            if len(data) >= self.room:
                self.file.write(data[: max(0, self.room)])
                self.file.flush()
                die()
            self.room -= len(data)
            self.file.write(data)

    if what == "encode":
        models.Clip.encode_views = after(models.Clip.encode_views)
    elif what == "adapt":
        engine.to_records = after(engine.to_records)
    elif what == "bytes":
        records_module.open = Torn
    elif what == "json":
        engine.write_json = after(engine.write_json)
    run(config, progress=False)


# a fork of a clean process that has imported torch: a second start costs milliseconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "open_clip", "scipy.stats", "tpt_nb.runs", "pandas"])


def start(config: RunConfig, kill: tuple | None = None) -> int:
    process = SERVER.Process(target=child, args=(config, kill))
    process.start()
    process.join(120)
    return process.exitcode


def records_of(config: RunConfig) -> bytes:
    (path,) = Path(config.out).glob("*/records.jsonl")
    return path.read_bytes()


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory) -> bytes:
    config = RunConfig.from_dict(world | {"out": str(tmp_path_factory.mktemp("undisturbed"))})
    assert start(config) == 0
    return records_of(config)


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_and_started_again_leaves_the_same_records(
    world, tmp_path, undisturbed, seed
):
    rng = np.random.default_rng(seed)
    cuts = sorted(rng.integers(1, len(undisturbed), 3).tolist())
    kills = [
        ("json", 0),  # before config.json
        ("encode", int(rng.integers(1, 50))),
        *(("bytes", cut) for cut in cuts),  # in the middle of a line, mostly
        ("adapt", 0),  # a group begun, nothing written
        ("json", 1),  # everything there but the summary
    ]
    config = RunConfig.from_dict(
        world | {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "runs")}
    )
    before = 0
    for kill in kills:
        assert start(config, kill) == -signal.SIGKILL, kill
        if kill[0] == "bytes":
            assert len(records_of(config)) >= before
            before = undisturbed[: kill[1]].rfind(b"\n") + 1
            assert records_of(config)[:before] == undisturbed[:before], "nothing finished is lost"
    assert not list(Path(config.out).glob("*/summary.json"))
    assert start(config) == 0
    assert records_of(config) == undisturbed
    (summary,) = Path(config.out).glob("*/summary.json")
    assert json.loads(summary.read_text())["n"] == undisturbed.count(b"\n")


def test_killed_from_outside(world, tmp_path, undisturbed):
    config = RunConfig.from_dict(world | {"out": str(tmp_path)})
    code = (
        "import sys, json, time, torch; torch.set_num_threads(1)\n"
        "from tpt_nb.runs import config, engine as e; config.GROUP = e.GROUP = 8\n"
        "real = e.to_records\n"
        "e.to_records = lambda *a: (time.sleep(0.3), real(*a))[1]\n"  # time to aim
        "e.run(json.loads(sys.argv[1]), progress=False)"
    )
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config))]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if any(path.stat().st_size for path in tmp_path.glob("*/records.jsonl")):
                process.kill()
            time.sleep(0.002)
    assert process.returncode == -signal.SIGKILL
    assert 0 < records_of(config).count(b"\n") < undisturbed.count(b"\n")
    assert start(config) == 0
    assert records_of(config) == undisturbed


def test_any_cut_of_the_file_is_mended(config):
    whole = one_run(config)
    path, want = whole.dir / "records.jsonl", (whole.dir / "records.jsonl").read_bytes()
    for cut in np.random.default_rng(0).integers(0, len(want) + 1, 6):
        path.write_bytes(want[:cut])
        again = one_run(config)  # the summary that is there does not fit the records
        assert path.read_bytes() == want
        assert again.summary["resumed"] == want[:cut].count(b"\n")
    lines = want.split(b"\n")
    lines[3] = lines[3][:20] + b"\0\0\0" + lines[3][23:]
    path.write_bytes(b"\n".join(lines))
    assert one_run(config).summary["resumed"] == 3
    assert path.read_bytes() == want


# --- repeatability -------------------------------------------------------------------------------


def test_two_runs_and_other_workers_give_the_same_records(config, tmp_path):
    first = one_run(config)
    want = (first.dir / "records.jsonl").read_bytes()
    for k, workers in enumerate((0, 2)):
        other = {"out": str(tmp_path / f"{k}"), "cache": str(tmp_path / f"cache{k}")}
        again = one_run(config, workers=workers, **other)
        assert again.summary["encoded"] == len(again.records)
        assert (again.dir / "records.jsonl").read_bytes() == want
        assert again.name == first.name
    different = one_run(config, seed=1)
    assert different.name != first.name
    assert [r["loss"] for r in different.records] != [r["loss"] for r in first.records]
    assert [r["conf_before"] for r in different.records] == [
        r["conf_before"] for r in first.records
    ], "view 0 does not depend on the seed"


def test_a_finished_run_is_loaded(config, capsys, monkeypatch):
    first = one_run(config)
    monkeypatch.setattr(models, "load", None)  # nothing may be computed
    capsys.readouterr()
    again = one_run(config)
    out = capsys.readouterr().out
    assert "is complete" in out and BROKEN in out
    assert (again.records, again.summary) == (first.records, first.summary)
    assert runs.load_run(first.dir).records == first.records


# --- what a run holds ----------------------------------------------------------------------------


def test_records_agree_with_the_logits(config):
    done = one_run(config)
    assert [r["id"] for r in done.records] == sorted(r["id"] for r in done.records)
    assert len(done.records) == len(CLASSES) * PER_CLASS
    clip = models.load(config.model, "cpu")
    features = models.Prompts(clip, CLASSES).text_features()
    for r in done.records[::7]:
        image = Image.open(Path(config.root) / r["id"]).convert("RGB")
        from tpt_nb.views import RandomViews

        view = RandomViews(0, size=clip.image_size)(image, 0)
        p = (clip.logit_scale * clip.encode_views(view) @ features.T).softmax(-1)[0]
        assert r["target"] == CLASSES.index(r["id"].split("/")[0])
        assert r["pred_before"] == int(p.argmax())
        assert r["conf_before"] == pytest.approx(float(p.max()), abs=1e-5)
        assert r["prob_target_before"] == pytest.approx(float(p[r["target"]]), rel=1e-4)
        assert r["entropy_before"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
        assert r["top5_before"] == (r["target"] in p.topk(5).indices.tolist())
        assert len(r["selected"]) == 2 and set(r["selected"]) <= set(range(8))  # int(8 * 0.3)
    assert any(r["conf_before"] != r["conf_after"] for r in done.records)


def test_an_undecodable_image_is_counted_and_named(config, capsys):
    done = one_run(config)
    failed = done.summary["failed"]
    assert failed["count"] == 1 and done.summary["n"] == len(CLASSES) * PER_CLASS
    assert failed["images"][0]["path"].endswith(BROKEN) and failed["images"][0]["error"]
    assert BROKEN in capsys.readouterr().out
    assert not any(BROKEN in r["id"] for r in done.records)


def test_the_summary_is_computed_from_the_records(config):
    done = one_run(config)
    for key, value in metrics.summarize(done.records).items():
        assert done.summary[key] == value
    low, high = done.summary["accuracy_after_ci95"]
    assert low <= done.summary["accuracy_after"] <= high
    assert done.summary["seconds_per_image"] > 0
    assert {"torch", "python", "tpt_nb"} <= set(done.summary["versions"])
    on_disk = json.loads((done.dir / "summary.json").read_text())
    assert on_disk == json.loads(json.dumps(done.summary))


def test_methods_see_the_same_images_and_prompt(config):
    made = {m: one_run(config, method=m) for m in ("zero_shot", "confident_view", "tpt")}
    for done in made.values():
        for r, base in zip(done.records, made["zero_shot"].records, strict=True):
            assert r["id"] == base["id"] and r["pred_before"] == base["pred_after"]
            assert r["conf_before"] == pytest.approx(base["conf_after"], abs=2e-5)
    assert made["zero_shot"].config.n_aug == 0
    result = metrics.compare(made["zero_shot"].records, made["tpt"].records)
    assert result["n"] == len(CLASSES) * PER_CLASS and result["only_a"] == 0


def test_prompts_of_a_run(config, world):
    plain = one_run(config, method="zero_shot")
    path = str(Path(world["model"]).with_name("coop.pth.tar"))
    coop = one_run(config, method="zero_shot", coop=path)
    single = one_run(config, method="zero_shot", templates="single")
    assert "coop=coop" in coop.name and "templates=single" in single.name
    conf = {
        k: [r["conf_after"] for r in v.records]
        for k, v in {"plain": plain, "coop": coop, "single": single}.items()
    }
    assert conf["single"] == pytest.approx(conf["plain"], abs=2e-5)  # the same sentence
    assert conf["coop"] != pytest.approx(conf["plain"], abs=1e-3)


def test_reduced_size(config):
    some, whole = one_run(config, reduced_size=12), one_run(config, reduced_size=0)
    assert some.summary["n"] + some.summary["failed"]["count"] == 12
    assert len(whole.records) == len(CLASSES) * PER_CLASS
    assert whole.name == one_run(config, reduced_size=None).name
    with pytest.raises(ValueError, match="1000.*55"):
        one_run(config, reduced_size=1000)


def test_tensorboard_events_come_from_the_records(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one_run(config)
    done = one_run(config, tensorboard=True)  # on a finished run, too
    assert len(list(done.dir.glob("events.*"))) == 1
    events = EventAccumulator(str(done.dir), {"scalars": 0})
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    s = done.summary
    assert last["AccuracyTOP1/Base"] == pytest.approx(s["accuracy_before"])
    assert last["AccuracyTOP1/Final_TPT_coop"] == pytest.approx(s["accuracy_after"])
    assert last["AccuracyTOP5/TPT_coop_Top5"] == pytest.approx(s["top5_after"])
    assert last["Samples/TPTcumulative_changed"] == s["improved"] - s["worsened"]
    assert last["Samples-Global/NImproved"] == s["improved"]
    assert last["crossEntropy/Final_Base"] / s["n"] == pytest.approx(s["cross_entropy_before"])
    confidence = [e.value for e in events.Scalars("confidence/TPT_coop")]
    assert confidence == pytest.approx([r["conf_after"] for r in done.records])
    curves = runs.read_scalars(done.dir)
    assert curves["confidence/TPT_coop"][1] == pytest.approx(confidence)
    for tags in (events.Tags()["scalars"], events.Tags()["tensors"], events.Tags()["images"]):
        assert all(runs.meaning(tag) for tag in tags)  # the glossary knows them all
    with pytest.raises(ValueError, match="has no events"):
        runs.read_scalars(done.dir.parent)


def test_changed_images_are_in_the_events_by_class_and_as_pictures(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = one_run(config)
    records = [dict(r, pred_before=0, pred_after=0) for r in done.records]
    for i, r in enumerate(records):  # every third improves, every third worsens
        if i % 3 < 2:
            r[("pred_after", "pred_before")[i % 3]] = r["target"]
            r[("pred_before", "pred_after")[i % 3]] = (r["target"] + 1) % len(CLASSES)
    (tmp_path / "events").mkdir()
    dataset, _ = runs.data_of(done.config)
    edited = runs.Run(tmp_path / "events", done.config, records, done.summary)
    runs.write_tensorboard(edited, dataset.classnames, dataset)
    events = EventAccumulator(str(tmp_path / "events"), {"images": 0, "tensors": 0})
    events.Reload()
    for k, name in enumerate(("Improved", "Worsened")):
        (tag,) = [t for t in events.Tags()["tensors"] if t.startswith(f"Samples-Ids/{name}")]
        said = json.loads(events.Tensors(tag)[0].tensor_proto.string_val[0])
        of = [r for i, r in enumerate(records) if i % 3 == k]
        assert sorted(i for some in said.values() for i in some) == sorted(r["id"] for r in of)
        for words, ids in said.items():
            number, text = words.split(" ", 1)
            assert text == dataset.classnames[int(number)]
            assert {r["target"] for r in of if r["id"] in ids} == {int(number)}
        pictures = events.Images(f"Images/{name}")
        assert [p.step for p in pictures] == [3 * j + k for j in range(min(12, len(of)))]
    assert all(runs.meaning(tag) for kind in ("images", "tensors") for tag in events.Tags()[kind])


def test_the_bar_says_how_many_are_right_so_far(config, monkeypatch):
    said, real = [], engine.bar

    def watched(*args):
        shown = real(*args)
        shown.set_postfix_str = lambda text, refresh: said.append(text)
        return shown

    monkeypatch.setattr(engine, "bar", watched)
    done = one_run(config)
    assert said[-1] == f"{100 * done.summary['accuracy_after']:.1f} % right"


# --- names and identity --------------------------------------------------------------------------


def test_run_names_say_what_differs(config):
    name = runs.run_name
    plain = name(config)
    assert plain.startswith("folder_tiny_tpt_")
    assert "seed" not in plain and "lr=" not in plain and "overlap" not in plain
    changed = config.replace(seed=3, augmix=True, learning_rate=0.01, run_name="mine")
    for part in ("mine_", "seed=3", "augmix=True", "lr=0.01"):
        assert part in name(changed)
    same = config.replace(
        workers=2, tensorboard=True, learning_rate=5e-3, loss="defaultTPT", overlap=0,
        augmenter="AugmenterTPT", out="elsewhere", device="auto" if not machine.has_gpu()
        else "cpu",
    )  # fmt: skip
    assert name(same) == plain
    assert len(name(config.replace(ctx_init="a photo of a / " * 90))) < 200


def test_weights_count_by_content(config, tmp_path):
    name = runs.run_name(config)
    file = tmp_path / "tiny.safetensors"
    models.save_mini(models.build_mini(1, TINY), [1, 2, 3], file)
    assert runs.run_name(config.replace(model=str(file))) != name


def test_a_folder_of_another_run_is_refused(config):
    done = one_run(config)
    header = json.loads((done.dir / "config.json").read_text())
    header["identity"]["seed"] = 5
    (done.dir / "config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"another configuration.*seed.*delete that folder"):
        one_run(config)


def test_start_is_front(config):
    names = [runs.run_name(config.replace(class_token_position=p)) for p in ("front", "start")]
    assert names[0] == names[1] and "position=front" in names[0]


def test_other_images_under_the_same_name_are_refused(config, tmp_path):
    import shutil

    root = tmp_path / "images"
    shutil.copytree(config.root, root)
    one_run(config, root=str(root))
    (root / "star" / "0.png").unlink()
    with pytest.raises(ValueError, match="other data.*fingerprint"):
        one_run(config, root=str(root))


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    ({"loss": "marginal_entrpy"}, "unknown loss.*did you mean 'marginal_entropy'.*mean_entropy"),
    ({"method": "TPT2"}, "unknown method 'TPT2'; did you mean 'tpt'.*zero_shot"),
    ({"profile": "big"}, "unknown profile 'big'.*auto, full, mini"),
    ({"augmenter": "randm"}, "unknown augmenter.*'random'"),
    ({"dataset": "iconshift-b"}, "unknown data set.*iconshift-a.*folder"),
    ({"model": "RN5O"}, "unknown model 'RN5O'.*RN50"),
    ({"device": "gpu"}, "unknown device 'gpu'.*cuda"),
    ({"class_token_position": "back"}, "class_token_position.*end, middle, front"),
    ({"templates": "eight"}, "unknown templates 'eight'.*seven"),
    ({"templates": "seven"}, "no context.*tpt"),
    ({"optimizer": "adam"}, "unknown optimizer.*adamw"),
    ({"lambda_q": 3.0}, "lambda_q=3.0 is for method 'mta', not 'tpt'"),
    ({"options": {"stepps": 2}}, "unknown option of tpt 'stepps'; did you mean"),
    ({"exact": "slow"}, "unknown exact.*paper"),
    ({"selection_p_all": 0.0}, r"selection_p_all is 0.0; it must be a fraction in \(0, 1\]"),
    ({"selection_p_all": 1.5}, r"selection_p_all is 1.5"),
    ({"selection_p_all": float("nan")}, r"selection_p_all is nan"),
    ({"selection_p_patch": -1}, r"selection_p_patch is -1"),
    ({"learning_rate": 0}, "learning_rate is 0; it must be a positive"),
    ({"n_aug": -1}, "n_aug is -1"),
    ({"n_aug": "63"}, r"n_aug is '63' \(str\); it must be int"),
    ({"n_aug": True}, r"n_aug is True \(bool\)"),
    ({"augmix": 1}, r"augmix is 1 \(int\); it must be bool"),
    ({"severity": 11}, "severity is 11.*1 to 10"),
    ({"reduced_size": -3}, "reduced_size is -3"),
    ({"ctx_init": ""}, "n_ctx"),
    ({"coop": "/nowhere/model.pth.tar"}, "no file /nowhere"),
    ({"root": "/nowhere/images"}, "/nowhere/images"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_values_are_named(config, change, message):
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        one_run(config, **change)
    assert not Path(config.out).exists(), "nothing is left behind"


def test_the_known_names_are_those_of_the_registries(config):
    with pytest.raises(ValueError) as error:
        one_run(config, loss="x")
    assert all(name in str(error.value) for name in losses.LOSSES)


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match="parameter 'learnig_rate'; did you mean 'learning_rate'"):
        RunConfig.from_dict({"learnig_rate": 1})
    assert RunConfig.from_dict({"n_aug": 3}) == RunConfig(n_aug=3)


@pytest.mark.parametrize("shape, message", [((3, 64), "M=3"), ((4, 100), "width 100")])
def test_a_coop_file_that_does_not_fit(config, tmp_path, shape, message):
    models.save_coop(tmp_path / "c.pth.tar", torch.zeros(shape), epoch=1)
    with pytest.raises(ValueError, match=message):
        one_run(config, coop=str(tmp_path / "c.pth.tar"))
    assert not Path(config.out).exists()


def test_a_set_without_readable_images_is_an_error(config, tmp_path):
    (tmp_path / "none" / "star").mkdir(parents=True)
    with pytest.raises(ValueError, match="none"):
        one_run(config, root=str(tmp_path / "none"))
    (tmp_path / "none" / "star" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 1 images.*0\.png"):
        one_run(config, root=str(tmp_path / "none"))


# --- profiles ------------------------------------------------------------------------------------


def test_auto_is_mini_without_a_gpu_and_says_why_once(config, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")
    monkeypatch.setattr(messages, "_said", set())
    assert runs.choose_profile(RunConfig()) == ("mini", "no CUDA GPU here")
    one_run(config)
    one_run(config, n_aug=3)
    out = capsys.readouterr().out
    assert out.count("profile full: data set and model are named") == 1


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_auto_is_full_only_where_everything_is_there(monkeypatch, gpu, weights, data):
    def load(name, **_):
        if not data:
            raise FileNotFoundError(f"{name} is not downloaded")

    monkeypatch.setattr(machine, "gpu_problem", lambda: "" if gpu else "no CUDA GPU")
    monkeypatch.setattr(profile, "weights_here", lambda model: weights)
    monkeypatch.setattr(profile.datasets, "load", load)
    chosen, why = runs.choose_profile(RunConfig())
    assert chosen == ("full" if gpu and weights and data else "mini")
    missing = {"GPU": gpu, "weights": weights, "downloaded": data}
    word = next((word for word, there in missing.items() if not there), "are here")
    assert word in why
    assert runs.choose_profile(RunConfig(dataset="iconshift-a"))[0] == "mini"
    assert runs.choose_profile(RunConfig(profile="full"))[0] == "full"


def test_importing_is_light():
    code = "import sys, tpt_nb.__main__; print('torch' in sys.modules)"
    with contextlib.chdir(REPO):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


def test_any_method_in_place_of_any_other():
    """Methods give options of one name other defaults; a filled-in configuration takes any."""
    for first in registry.names():
        filled, _ = runs.resolve(RunConfig(method=first, profile="mini"))
        changed = {
            f.name
            for f in config_module.option_fields(first).values()
            if not f.metadata["shared"] and filled.options.get(f.name) != f.default
        }
        for second in [] if changed else registry.names():  # what was chosen is refused, see above
            other, _ = runs.resolve(filled.replace(method=second))
            assert other.method == second
            assert config_module.options_of(other)
