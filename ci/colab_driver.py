"""Run notebooks on a Colab GPU without a browser, and pack what they computed.

    colab run --gpu T4 ci/colab_driver.py --repo OWNER/NAME --ref TAG --only 01,02 -p profile full

(``colab`` is Google's google-colab-cli.) The file is on its own there: it clones the repository,
installs what Colab lacks, hands the notebooks to ``ci/run_notebooks.py`` (papermill, one process
each) and packs executed notebooks, pages, logs, records and ``results.json`` into one zip for
``colab download``. Its exit code is that of the run. Within a clone it runs that clone.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

KEPT = (".ipynb", ".html", ".log", ".json", ".jsonl", ".csv", ".md")
KERNEL = ("papermill", "nbconvert", "psutil")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``-p NAME VALUE`` sets a parameter of the notebooks, as in ``ci/run``."""
    parser = argparse.ArgumentParser(description="Run notebooks on a Colab machine.")
    parser.add_argument("--repo", default="", help="OWNER/NAME on GitHub; not needed in a clone")
    parser.add_argument("--ref", default="", help="tag or branch")
    parser.add_argument("--only", default="", help="numbers of notebooks, as 01,02; default: all")
    parser.add_argument("-p", "--param", nargs=2, action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder to work in")
    parser.add_argument("--cpu", action="store_true", help="go on if there is no GPU")
    parser.add_argument("--timeout", type=int, help="seconds per notebook")
    return parser.parse_args(argv)


def repository(args: argparse.Namespace) -> Path:
    """The clone that this file is in, or a new one."""
    here = Path(__file__).resolve().parent.parent
    if (here / "tpt_nb" / "__main__.py").is_file():
        return here
    clone = args.work / "tpt_nb_clone"
    if not clone.is_dir():
        if not (args.repo and args.ref):
            raise SystemExit("colab_driver: say --repo OWNER/NAME and --ref TAG")
        url = f"https://github.com/{args.repo}"
        command = ["git", "clone", "--quiet", "--depth=1", "--branch", args.ref, url, str(clone)]
        subprocess.run(command, check=True)
    return clone


def prepare(repo: Path) -> None:
    """Install what the machine lacks, without touching what a kernel has loaded."""
    sys.path.insert(0, str(repo))
    from tpt_nb.lessons import setup

    setup.install()
    needed = repo / "ci" / ".colab-driver.txt"
    try:
        needed.write_text("\n".join(KERNEL))
        lacking = setup.missing(needed)
    finally:
        needed.unlink(missing_ok=True)
    if lacking:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *lacking], check=True)


def device() -> str:
    """The GPU's name, in a process of its own so that this one holds none of its memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def environment(repo: Path) -> dict[str, str]:
    """For kernels without a front end; the backend of a calling notebook does not reach them."""
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"TPT_NB_HEADLESS": "1", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
    env.setdefault("TPT_NB_DOWNLOAD", "1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repo), env.get("PYTHONPATH", "")]))
    return env


def pack(out: Path, target: Path) -> int:
    """Zip what was computed (no features, no images); returns the number of files."""
    count = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(out.rglob("*")):
            kept = path.suffix in KEPT and "cache" not in path.relative_to(out).parts
            if kept and path.is_file():
                archive.write(path, path.relative_to(out))
                count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code of the run."""
    args = arguments(argv)
    repo = repository(args)
    prepare(repo)
    gpu = device()
    print(f"colab_driver: {gpu or 'no GPU'}", flush=True)
    if not gpu and not args.cpu:
        print("colab_driver: no GPU was given; --cpu goes on without one", file=sys.stderr)
        return 3
    out = args.work / "out"
    command = [sys.executable, str(repo / "ci" / "run_notebooks.py"), "--out", str(out)]
    command += ["--only", args.only] if args.only else []
    command += ["--timeout", str(args.timeout)] if args.timeout else []
    for name, value in args.param:
        # run_notebooks.py has an option of its own for the profile, which sets the time limit too
        command += ["--profile", value] if name == "profile" else ["-p", name, value]
    code = subprocess.run(command, env=environment(repo), cwd=repo).returncode
    target = args.work / "tpt_nb-results.zip"
    if out.is_dir():
        print(f"colab_driver: {pack(out, target)} files in {target}")
    print(f"colab_driver: exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
