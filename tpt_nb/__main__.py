"""``python -m tpt_nb evaluate ...`` does a run, ``python -m tpt_nb compare RUN RUN`` compares two,
``python -m tpt_nb build-database ...`` embeds images for retrieval,
``python -m tpt_nb generate ...`` makes variations of images by diffusion,
``python -m tpt_nb download NAME`` brings a data set, ``python -m tpt_nb plan`` says beforehand
what a large run will take.

Mistakes in what was asked for (a name, a value, a file) are one line on stderr and exit code 2; set
``TPT_NB_TRACEBACK=1`` to see where they come from.
"""

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tpt_nb.core.messages import unknown
from tpt_nb.runs import RunConfig, load_run, run

GENERATE = (  # the options of evaluate that the command generate has too
    *("dataset", "root", "reduced_size", "subset_seed"),
    *("generator", "n_generated", "generator_seed", "device", "cache"),
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the closest option."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        print(f"{self.prog}: {message} (--help lists what there is)", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The command line; the options of ``evaluate`` are the fields of ``RunConfig``."""
    main_parser = Parser(
        prog="python -m tpt_nb", description="Test-time adaptation of CLIP from a shell."
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    evaluate = commands.add_parser(
        "evaluate", help="one run: encode, adapt, record", allow_abbrev=False
    )
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        text = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        if hints[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": _reader(hints[field.name]), "metavar": "X"}
        evaluate.add_argument(*names, help=text, default=field.default, **kind)
    evaluate.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    add_cluster_options(evaluate)
    compare = commands.add_parser(
        "compare", help="two runs image by image: gain of the second", allow_abbrev=False
    )
    compare.add_argument("runs", nargs=2, metavar="RUN", help="folder of a run, or its name in out")
    compare.add_argument("--out", default="runs", help="folder of the runs (default: runs)")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    compare.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    build = commands.add_parser(
        "build-database", help="embed images without labels, for ra_tta", allow_abbrev=False
    )
    build.add_argument("--images", required=True, metavar="DIR", help="any folder of images")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the database")
    build.add_argument("--model", default="mini", help="as in evaluate (default: mini)")
    build.add_argument("--device", default="", help="cpu, cuda ... (default: cuda if there is one)")
    plan = commands.add_parser(
        "plan", help="passes, disk, hours and cost of a large run", allow_abbrev=False
    )
    for name, default, text in (
        ("--dataset", "imagenet", "by name; it need not be here"),
        ("--model", "RN50", "one that data/costs.json or --costs has"),
        ("--device", "cuda", "cuda, or cpu: workers are then processes of one core each"),
        ("--cache", "", "where the features will be; default: $TPT_NB_CACHE or ~/.cache/tpt_nb"),
        ("--costs", "", "what ci/bench/tpt.py --json printed on your machine"),
    ):
        plan.add_argument(name, default=default, metavar="X", help=f"{text} (default: {default!r})")
    for name, kind, default, text in (
        ("--views", int, 64, "of an image, itself included"),
        ("--seeds", int, 1, "of the views; each is encoded apart"),
        ("--images", int, None, "instead of the size of the data set"),
        ("--classes", int, None, "instead of those of the data set"),
        ("--price", float, 2.0, "of a GPU per hour, in any currency; an assumption"),
        ("--images-per-second", float, None, "that one GPU encodes, with all their views"),
        ("--spread", float, 0.2, "of the time of a shard: standard deviation of its logarithm"),
        ("--failures", float, 0.01, "probability that a task fails and is done again"),
    ):
        plan.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} ({default})")
    plan.add_argument("--methods", nargs="+", default=["tpt"], metavar="NAME")
    plan.add_argument("--workers", nargs="+", type=int, default=[1, 8, 64], metavar="N",
                      help="GPUs (or processes); default: 1 8 64")  # fmt: skip
    plan.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    generate = commands.add_parser(
        "generate", help="make variations of images, for difftpt", allow_abbrev=False
    )
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    for name in GENERATE:
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        text = f"{fields[name].metadata['help']} (default: {fields[name].default!r})"
        kind = {"type": _reader(hints[name]), "metavar": "X"}
        generate.add_argument(*names, help=text, default=fields[name].default, **kind)
    download = commands.add_parser(
        "download", help="bring a data set (data/README.md lists them)", allow_abbrev=False
    )
    download.add_argument("name", metavar="NAME", help="imagenet-a, dtd ..., coop-weights")
    download.add_argument("--root", default="", help="where to (default: $TPT_NB_DATASETS)")
    return main_parser


def add_cluster_options(to: argparse.ArgumentParser) -> None:
    """``--cluster`` and ``--cluster-workers``, which scripts of ``ci/`` have too."""
    to.add_argument(
        "--cluster",
        metavar="local|ADDRESS",
        help="spread the work with Ray: over the GPUs or cores of this machine, or over a cluster "
        "(address as of `ray start --head`); cache and out may then be s3://, gs:// ...",
    )
    to.add_argument(
        "--cluster-workers",
        type=int,
        metavar="N",
        help="at a time, at most; default: one per GPU if there are any, else one per core",
    )


def _reader(hint: object):
    """What turns the text of an option into the field's type; none, null and '' give None."""
    kinds = typing.get_args(hint) or (hint,)

    def read(text: str):
        if type(None) in kinds and text.lower() in ("", "none", "null"):
            return None
        return kinds[0](text)

    read.__name__ = kinds[0].__name__  # argparse: "invalid int value"
    return read


def result(run_) -> dict:
    """The fields of a run (anything with its ``summary``) that ``evaluate --json`` prints."""
    s = run_.summary
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


def _evaluate(args: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(RunConfig)]
    config = RunConfig(**{name: getattr(args, name) for name in names})
    if args.cluster:
        from tpt_nb.scale import cluster

        done, report = cluster.evaluate(config, args.cluster, args.cluster_workers)
        print(f"{done.said}{report.text()}")
    else:
        done = run(config)
    s = result(done)
    print(f"{s['dataset']}, {s['model']}, {s['method']}, {s['n']} images -> {done.dir}")
    print(f"  zero-shot  {_with_interval(s['zero_shot'], s['zero_shot_ci95'])}")
    print(f"  {s['method']:<9}  {_with_interval(s['accuracy'], s['accuracy_ci95'])}")
    print(f"  improved {s['improved']}, worsened {s['worsened']}, p {s['p_value']:.3g} (McNemar)")
    if args.json:
        print(json.dumps(s))


def _compare(args: argparse.Namespace) -> None:
    from tpt_nb.metrics import compare

    runs = [load_run(_find(name, Path(args.out))) for name in args.runs]
    prints = [json.loads((r.dir / "config.json").read_text())["dataset"] for r in runs]
    if prints[0]["fingerprint"] != prints[1]["fingerprint"]:
        raise ValueError(
            f"the runs are over different data: {prints[0]['name']} ({prints[0]['fingerprint']}) "
            f"and {prints[1]['name']} ({prints[1]['fingerprint']})."
        )
    c = compare(runs[0].records, runs[1].records, seed=args.seed)
    for letter, run_ in zip("ab", runs, strict=True):
        interval = _with_interval(c[f"accuracy_{letter}"], c[f"accuracy_{letter}_ci95"])
        print(f"{letter}: {interval}  {run_.name}")
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
    if args.json:
        print(json.dumps({"a": runs[0].name, "b": runs[1].name, **c}))


def _plan(args: argparse.Namespace) -> None:
    from tpt_nb.scale import plan

    values = {k: v for k, v in vars(args).items() if k not in ("command", "json", "costs")}
    found = plan.plan(**values, measured=plan.read_costs(args.costs))
    print(plan.text(found))
    if args.json:
        print(json.dumps(found))


def _download(args: argparse.Namespace) -> None:
    from tpt_nb.datasets import sources

    print(f"{args.name} is in {sources.get(args.name, args.root or None)}")


def _build_database(args: argparse.Namespace) -> None:
    from tpt_nb import models
    from tpt_nb.methods import ra_tta

    pictures = ra_tta.folder_pictures(args.images)
    try:
        model = models.load(args.model, device=args.device or None)
    except RuntimeError as error:  # weights that cannot be fetched, no such device
        raise ValueError(str(error)) from error
    done = ra_tta.build(pictures, model, args.out)
    print(
        f"{len(done)} of {len(pictures.items)} images, vectors of {model.embed_dim} -> {args.out}"
    )


def _generate(args: argparse.Namespace) -> None:
    from tpt_nb import datasets
    from tpt_nb.methods import difftpt
    from tpt_nb.runs import resolve

    values = {name: getattr(args, name) for name in GENERATE}
    config, _ = resolve(RunConfig(**values, method="difftpt"))
    if config.generator == "crops":
        raise ValueError("generator crops is made of views of the run: there is nothing to make.")
    dataset = datasets.load(
        config.dataset, config.reduced_size, config.subset_seed, config.root or None
    )
    generator = difftpt.load_generator(config.generator, config.device)
    n = config.n_generated
    made = difftpt.generate(dataset, generator, n, config.generator_seed, config.cache)
    seconds = sum(made.seconds(image_id, n) for image_id in dataset.ids) / len(dataset)
    print(
        f"{n} variations of each of {len(dataset)} images, {seconds:.2f} s per image "
        f"-> {made.folder}"
    )


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
    args, rest = parser().parse_known_args(argv)
    if rest:
        options = [f"--{field.name}" for field in dataclasses.fields(RunConfig)]
        word = rest[0].split("=")[0].replace("-", "_").replace("__", "--", 1)
        plan_options = ("dataset", "model", "device", "cache", "costs", "views", "seeds", "images",
                        "classes", "price", "images-per-second", "spread", "failures", "methods",
                        "workers", "json")  # fmt: skip
        known = {
            "plan": [f"--{name}" for name in plan_options],
            "evaluate": [*options, "--json", "--cluster", "--cluster-workers"],
            "compare": ["--json", "--out", "--seed"],
            "build-database": ["--images", "--out", "--model", "--device"],
            "download": ["--root"],
            "generate": [f"--{name}" for name in GENERATE],
        }[args.command]
        print(f"python -m tpt_nb: {unknown('option', word, known)}", file=sys.stderr)
        return 2
    try:
        does = {"evaluate": _evaluate, "compare": _compare, "build-database": _build_database}
        does |= {"download": _download, "generate": _generate, "plan": _plan}
        does[args.command](args)
    except (ValueError, OSError) as error:
        if os.environ.get("TPT_NB_TRACEBACK"):
            raise
        print(f"python -m tpt_nb: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
