"""The command line: ``python -m tpt_nb COMMAND``; ``--help`` lists the commands.

Options are the fields of dataclasses: those of a run (``runs.RunConfig``), of the methods (their
``Options``), of the sweep and the leaderboard. Mistakes in what was asked for (a name, a value, a
file) are one line on stderr and exit code 2; ``TPT_NB_TRACEBACK=1`` shows where they come from.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tpt_nb.core.command_line import PROG, fields_of, parse, setting
from tpt_nb.core.messages import unknown


@dataclasses.dataclass
class Output:
    """What a command that ends in numbers has."""

    json: bool = setting(False, "end with one JSON object on a line")


@dataclasses.dataclass
class Cluster:
    """What a command has whose work can be spread."""

    cluster: str = setting(
        "",
        "local or ADDRESS: spread the work with Ray over the GPUs or cores of this machine, or "
        "over a cluster (as of `ray start --head`); cache and out may then be s3://, gs:// ...",
    )
    cluster_workers: int | None = setting(
        None, "at a time, at most; default: one per GPU if there are any, else one per core"
    )


@dataclasses.dataclass
class Compare(Output):
    out: str = setting("runs", "folder of the runs")
    seed: int = setting(0, "of the bootstrap")


@dataclasses.dataclass
class Database:
    images: str = setting("", "any folder of images")
    out: str = setting("", "folder of the database")
    model: str = setting("mini", "as in evaluate")
    device: str = setting("", "cpu, cuda ...; default: cuda if there is one")


@dataclasses.dataclass
class Download:
    root: str = setting("", "where to; default: $TPT_NB_DATASETS")


@dataclasses.dataclass
class Generate:
    part: str = setting("", "3/8 makes the third of eight parts; give all GPUs the same cache")


@dataclasses.dataclass
class Plan(Output):
    dataset: str = setting("imagenet", "by name; it need not be here")
    model: str = setting("RN50", "one that data/costs.json or costs has")
    device: str = setting("cuda", "cuda, or cpu: workers are then processes of one core each")
    methods: list[str] = setting(("tpt",), "one or more")
    workers: list[int] = setting((1, 8, 64), "GPUs (or processes)")
    views: int = setting(64, "of an image, itself included")
    seeds: int = setting(1, "of the views; each is encoded apart")
    images: int | None = setting(None, "instead of the size of the data set")
    classes: int | None = setting(None, "instead of those of the data set")
    price: float = setting(2.0, "of a GPU per hour, in any currency; an assumption")
    images_per_second: float | None = setting(None, "that one GPU encodes, with all their views")
    failures: float = setting(0.01, "share of the tasks that fail and are done again")
    cache: str = setting("", "where the features will be; default: $TPT_NB_CACHE")
    costs: str = setting("", "what ci/bench/tpt.py --json printed on your machine")


def run_fields() -> dict[str, tuple[object, object, str]]:
    """The options of a run, and those of all methods, each with the methods that have it."""
    from tpt_nb import methods, runs

    out = fields_of(runs.RunConfig)
    found: dict[str, list[str]] = {}
    options: dict[str, tuple[object, object, str]] = {}
    for name in methods.names():
        for flat, field in fields_of(methods.get(name).options).items():
            options.setdefault(flat, field)
            found.setdefault(flat, []).append(name)
    for flat, (hint, default, text) in options.items():
        out.setdefault(flat, (hint, default, f"{text} [{', '.join(found[flat])}]"))
    out["params"] = (str, "", "options of the method in one: lambda_q=4,lambda_y=0.2")
    return out


def _spread(values: dict) -> Callable | None:
    """What does many runs on a cluster, if one was asked for; takes its options out of the dict."""
    address, workers = values.pop("cluster", ""), values.pop("cluster_workers", None)
    if not address:
        return None
    from tpt_nb import scale

    return lambda configs: scale.run_all(configs, address, workers)


# --- the commands --------------------------------------------------------------------------------


def evaluate(argv: Sequence[str]) -> int:
    """one run: encode, adapt, record"""
    from tpt_nb import runs

    fields = run_fields() | fields_of(Output, Cluster)
    values = parse("evaluate", evaluate.__doc__, fields, argv)
    as_json = values.pop("json", False)
    address, workers = values.pop("cluster", ""), values.pop("cluster_workers", None)
    config = runs.RunConfig.from_dict(values)
    if address:
        from tpt_nb import scale

        done = scale.evaluate(config, address, workers)
    else:
        done = runs.run(config)
    s = result(done)
    print(f"{s['dataset']}, {s['model']}, {s['method']}, {s['n']} images -> {done.dir}")
    print(f"  zero-shot  {_with_interval(s['zero_shot'], s['zero_shot_ci95'])}")
    print(f"  {s['method']:<9}  {_with_interval(s['accuracy'], s['accuracy_ci95'])}")
    print(f"  improved {s['improved']}, worsened {s['worsened']}, p {s['p_value']:.3g} (McNemar)")
    if as_json:
        print(json.dumps(s))
    return 0


def result(run) -> dict:
    """The fields of a run's summary that ``evaluate --json`` prints."""
    s = run.summary
    return {
        "dataset": s["dataset"],
        "model": s["model"],
        "method": s["method"],
        "n": s["n"],
        "failed": s["failed"]["count"],
        "accuracy": s["accuracy_after"],
        "accuracy_ci95": s["accuracy_after_ci95"],
        "zero_shot": s["accuracy_before"],
        "zero_shot_ci95": s["accuracy_before_ci95"],
        "improved": s["improved"],
        "worsened": s["worsened"],
        "p_value": s["p_value"],
        "seconds_per_image": s["seconds_per_image"],
        # of the views that diffusion made, once, before the run
        **{key: s[key] for key in ("seconds_to_generate",) if key in s},
    }


def sweep(argv: Sequence[str]) -> int:
    """a grid of runs from a YAML file, resumable, and one table"""
    from tpt_nb.runs.sweep import SweepOptions
    from tpt_nb.runs.sweep import sweep as do

    own = fields_of(SweepOptions)
    values = parse("sweep", sweep.__doc__, run_fields() | fields_of(Cluster) | own, argv,
                   {"grid": 1})  # fmt: skip
    grid, spread = Path(values.pop("grid")[0]), _spread(values)
    options = SweepOptions(**{name: values.pop(name) for name in own if name in values})
    return do(grid, options, values, spread)


def leaderboard(argv: Sequence[str]) -> int:
    """every method on the same views, one table"""
    from tpt_nb.runs.leaderboard import LeaderboardOptions
    from tpt_nb.runs.leaderboard import leaderboard as do

    own = fields_of(LeaderboardOptions)
    fields = run_fields() | fields_of(Cluster) | own
    values = parse("leaderboard", leaderboard.__doc__, fields, argv)
    spread = _spread(values)
    options = LeaderboardOptions(**{name: values.pop(name) for name in own if name in values})
    return do(options, values, spread)


def streams(argv: Sequence[str]) -> int:
    """online and transductive methods in many orders of the images"""
    from tpt_nb.runs.streams import StreamsOptions
    from tpt_nb.runs.streams import streams as do

    own = fields_of(StreamsOptions)
    values = parse("streams", streams.__doc__, run_fields() | own, argv)
    options = StreamsOptions(**{name: values.pop(name) for name in own if name in values})
    return do(options, values)


def compare(argv: Sequence[str]) -> int:
    """two runs image by image: gain of the second"""
    values = parse("compare", compare.__doc__, fields_of(Compare), argv, {"run": 2})
    names, options = values.pop("run"), Compare(**{k: v for k, v in values.items() if k != "run"})
    from tpt_nb import metrics, runs

    pair = [runs.load_run(_find(name, Path(options.out))) for name in names]
    prints = [json.loads((r.dir / "config.json").read_text())["dataset"] for r in pair]
    if prints[0]["fingerprint"] != prints[1]["fingerprint"]:
        raise ValueError(
            f"the runs are over different data: {prints[0]['name']} ({prints[0]['fingerprint']}) "
            f"and {prints[1]['name']} ({prints[1]['fingerprint']})."
        )
    c = metrics.compare(pair[0].records, pair[1].records, seed=options.seed)
    for letter, run in zip("ab", pair, strict=True):
        interval = _with_interval(c[f"accuracy_{letter}"], c[f"accuracy_{letter}_ci95"])
        print(f"{letter}: {interval}  {run.name}")
    print(
        f"b - a: {100 * c['gain']:+.2f} points, 95 % interval "
        f"{_interval(c['gain_ci95'])} (bootstrap {_interval(c['gain_bootstrap95'])})"
    )
    print(
        f"{c['n']} images in both: improved {c['improved']}, worsened {c['worsened']}, "
        f"p {c['p_value']:.3g} (McNemar, exact)"
    )
    if c["only_a"] or c["only_b"]:
        print(f"left out: {c['only_a']} images only in a, {c['only_b']} only in b")
    if options.json:
        print(json.dumps({"a": pair[0].name, "b": pair[1].name, **c}))
    return 0


def generate(argv: Sequence[str]) -> int:
    """make variations of images by diffusion, for difftpt"""
    from tpt_nb import runs
    from tpt_nb.methods.difftpt import GENERATE, NAME, make_pictures

    fields = {name: field for name, field in run_fields().items() if name in GENERATE}
    fields |= fields_of(Generate, Cluster)
    values = parse("generate", generate.__doc__, fields, argv) | {"method": NAME}
    part = values.pop("part", "")
    address, workers = values.pop("cluster", ""), values.pop("cluster_workers", None)
    config, _ = runs.resolve(runs.RunConfig.from_dict(values))
    options = runs.options_of(config)
    if not address:
        print(make_pictures(options, config, part))
        return 0
    if part:
        raise ValueError("--part and --cluster exclude each other: a cluster makes all parts.")
    from tpt_nb import scale

    config.cache = str(Path(config.cache).absolute())
    parts = 4 * (workers or 8)
    shares = [(options, config, f"{k + 1}/{parts}") for k in range(parts)]
    failed = []
    for i, said in scale.spread(make_pictures, shares, address, workers):
        print(f"part {shares[i][2]}: {said}", flush=True)
        failed += [said] if isinstance(said, Exception) else []
    if failed:
        raise ValueError(f"{len(failed)} of {len(shares)} parts failed: the same command goes on.")
    return 0


def download(argv: Sequence[str]) -> int:
    """bring a data set (data/README.md lists them)"""
    values = parse("download", download.__doc__, fields_of(Download), argv, {"name": 1})
    from tpt_nb import datasets

    name = values.pop("name")[0]
    print(f"{name} is in {datasets.download(name, values.get('root') or None)}")
    return 0


def database(argv: Sequence[str]) -> int:
    """embed images without labels, for ra_tta"""
    options = Database(**parse("database", database.__doc__, fields_of(Database), argv))
    if not options.images or not options.out:
        raise ValueError("say which images to embed (--images DIR) and where to (--out DIR).")
    from tpt_nb import models
    from tpt_nb.methods import ra_tta

    pictures = ra_tta.folder_pictures(options.images)
    try:
        model = models.load(options.model, device=options.device or None)
    except RuntimeError as error:  # weights that cannot be fetched, no such device
        raise ValueError(str(error)) from error
    done = ra_tta.build(pictures, model, options.out)
    print(
        f"{len(done)} of {len(pictures.items)} images, vectors of {model.embed_dim} "
        f"-> {options.out}"
    )
    return 0


def plan(argv: Sequence[str]) -> int:
    """passes, disk, hours and cost of a large run"""
    values = vars(Plan(**parse("plan", plan.__doc__, fields_of(Plan), argv)))
    from tpt_nb import scale

    as_json, costs = values.pop("json"), values.pop("costs")
    found = scale.plan(**values, measured=scale.read_costs(costs))
    print(scale.plan_text(found))
    if as_json:
        print(json.dumps(found))
    return 0


COMMANDS = {
    f.__name__: f
    for f in (evaluate, sweep, leaderboard, streams, compare, generate, download, plan, database)
}


def _find(name: str, out: Path) -> Path:
    for path in (Path(name), out / name):
        if path.is_dir():
            return path
    known = sorted(p.parent.name for p in out.glob("*/config.json"))
    raise ValueError(unknown("run", name, known) if known else f"there is no run {name!r}.")


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:6.2f} % {_interval(interval)}"


def _interval(interval: Sequence[float]) -> str:
    return "[{:.2f}, {:.2f}]".format(*(100 * x for x in interval))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND [--help] ...\n\nTest-time adaptation of CLIP from a shell.\n")
        print("\n".join(f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items()))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"{PROG}: {unknown('command', words[0], COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("TPT_NB_TRACEBACK"):
            raise
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
