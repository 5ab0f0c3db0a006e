"""Run notebooks on a Colab GPU without a browser, and pack what they computed.

With google-colab-cli on this machine; its own options stand before the file, those of this file
behind it:

    colab run --gpu T4 --keep -s tta --timeout 86400 ci/colab_driver.py --repo OWNER/NAME \\
        --ref TAG --only 01,02 -p profile full
    colab download -s tta content/tpt_nb-results.zip results.zip
    colab stop -s tta

``--keep``, because without it the machine is gone before anything can be fetched; ``--timeout``,
because older releases of the tool end what says nothing for 30 seconds. A machine lives for twelve
hours at most. A run that is to outlive it is kept on Google Drive, which a person has to allow
once; started again with the same lines, it goes on where the lost machine stopped:

    colab new -s tta --gpu T4
    colab drivemount -s tta
    (echo 'import sys; sys.argv[1:] = "--drive --repo OWNER/NAME --ref TAG --only 01,02".split()'
     cat ci/colab_driver.py) | colab exec -s tta --timeout 86400

The tool pastes this file into a cell: there is no ``__file__``, and nothing beside it. So it clones
the repository, installs what Colab lacks, and hands the notebooks to ``ci/run_notebooks.py``
(papermill, one process each), whose lines it passes on; while there are none it says every 20
seconds that it is at work. Then it packs executed notebooks, pages, logs, records and
``results.json`` into one zip. Its exit code is that of the run. Within a clone it runs that clone.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

KEPT = (".ipynb", ".html", ".log", ".json", ".jsonl", ".csv", ".md")
DRIVE = Path("/content/drive/MyDrive")
BEAT = 20  # seconds without a line until one says that it is still at work
INSTALL = """\
import sys; sys.path.insert(0, sys.argv[1])
from tpt_nb.lessons import setup
setup.install(also=("papermill", "nbconvert", "psutil"))
"""
DEVICE = """\
import sys; sys.path.insert(0, sys.argv[1])
import torch
from tpt_nb.core import machine
print(problem if (problem := machine.gpu_problem()) else "GPU " + torch.cuda.get_device_name())
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``-p NAME VALUE`` sets a parameter of the notebooks, as in ``ci/run``."""
    parser = argparse.ArgumentParser(
        prog="colab_driver", description="Run notebooks on a Colab machine.", allow_abbrev=False
    )
    parser.add_argument("--repo", default="", help="OWNER/NAME on GitHub; not needed in a clone")
    parser.add_argument("--ref", default="", help="tag or branch")
    parser.add_argument("--only", default="", help="numbers of notebooks, as 01,02; default: all")
    parser.add_argument("-p", "--param", nargs=2, action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder to work in")
    parser.add_argument("--drive", action="store_true", help="keep results on Google Drive")
    parser.add_argument("--cpu", action="store_true", help="go on if there is no GPU")
    parser.add_argument("--timeout", type=int, help="end what makes no progress for so long (s)")
    return parser.parse_args(argv)


def stream(command: list[str], what: str, **more) -> int:
    """Run a command and pass its lines on, or a sign of life; returns its exit code.

    A kernel shows what Python prints, not what a child process writes to the terminal.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, errors="replace", bufsize=1, **pipes, **more)
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    began = time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=BEAT)
            except queue.Empty:
                line = f"colab_driver: {what}, {time.monotonic() - began:.0f} s ...\n"
            if line is None:
                return process.wait()
            print(line, end="", flush=True)
    finally:  # also when the cell is stopped
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def repository(args: argparse.Namespace) -> Path:
    """The clone that this file is in, or one beside it: a new one, or that of an earlier call."""
    if here := globals().get("__file__"):
        found = Path(here).resolve().parent.parent
        if (found / "tpt_nb" / "__main__.py").is_file():
            return found
    clone, url = args.work / "tpt_nb_clone", f"https://github.com/{args.repo}"
    if not (args.repo and args.ref) and not clone.is_dir():
        raise SystemExit("colab_driver: say --repo OWNER/NAME and --ref TAG")
    steps = []
    if not clone.is_dir():
        steps = [["clone", "-q", "--depth=1", "--branch", args.ref, url, str(clone)]]
    elif args.repo and args.ref:  # it may be of another tag
        steps = [["-C", str(clone), "fetch", "-q", "--depth=1", url, args.ref]]
        steps += [["-C", str(clone), "checkout", "-qf", "FETCH_HEAD"]]
    for step in steps:
        if stream(["git", *step], f"git {' '.join(step[:2])}"):
            raise SystemExit(f"colab_driver: git could not get {args.ref} of {url}")
    return clone


def device(repo: Path) -> str:
    """ "GPU" and its name, or why there is none; asked in a process that gives its memory back."""
    command = [sys.executable, "-c", DEVICE, str(repo)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (done.stdout or done.stderr).strip().split("\n")[-1]


def environment(repo: Path, drive: bool) -> dict[str, str]:
    """For kernels without a front end; the backend of a calling notebook does not reach them."""
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"TPT_NB_HEADLESS": "1", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
    env |= {"PYTHONUNBUFFERED": "1"}
    env.setdefault("TPT_NB_DOWNLOAD", "1")
    if drive:  # the notebooks' first cell does the rest
        env |= {"TPT_NB_DRIVE": "1", "TPT_NB_CACHE": str(DRIVE / "tpt_nb" / "cache")}
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
    args.work = args.work.resolve()
    if args.drive and not DRIVE.is_dir():
        print("colab_driver: Drive is not mounted: colab drivemount -s NAME, then again (exec)")
        return 4
    repo = repository(args)
    if stream([sys.executable, "-c", INSTALL, str(repo)], "installing what Colab lacks"):
        print("colab_driver: the installation failed")
        return 1
    found = device(repo)
    print(f"colab_driver: {found}", flush=True)
    if not found.startswith("GPU ") and not args.cpu:
        print("colab_driver: no GPU can be used; --cpu goes on without one")
        return 3
    out = (DRIVE / "tpt_nb" if args.drive else args.work) / "out"
    command = [sys.executable, str(repo / "ci" / "run_notebooks.py"), "--out", str(out)]
    command += ["--only", args.only] if args.only else []
    command += ["--timeout", str(args.timeout)] if args.timeout else []
    for name, value in args.param:
        # run_notebooks.py has an option of its own for the profile, which sets the time limit too
        command += ["--profile", value] if name == "profile" else ["-p", name, value]
    code = stream(command, "running", env=environment(repo, args.drive), cwd=repo)
    target = args.work / "tpt_nb-results.zip"
    if out.is_dir():
        print(f"colab_driver: {pack(out, target)} files in {target}")
        print(f"colab_driver: colab download -s NAME {str(target).lstrip('/')} results.zip")
    print(f"colab_driver: exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    code = main()
    if code:  # in a cell an exit without error would be shown as one
        sys.exit(code)
