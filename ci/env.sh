# Sourced by ci/run and ci/test: goes to the top of the repository, makes .venv once, and sets what
# headless runs need. Afterwards $PYTHON is the interpreter. To use an environment of your own instead:
# TPT_NB_PYTHON=/path/to/python bash ci/test

unset CDPATH # it would send cd to another folder
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null

setup() {
  local lists="requirements.txt ci/requirements-test.txt ci/constraints.txt"
  local stamp=.venv/installed want quiet=-qq
  if ! .venv/bin/python -c pass 2>/dev/null; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "python3 is $(python3 -V 2>&1 || true), but Python 3.11 or later is needed." >&2
      return 1
    fi
    rm -rf .venv
    python3 -m venv .venv || { rm -rf .venv; return 1; } # a half-made one would be taken for whole
  fi
  want="$PWD $(.venv/bin/python -V) $(cat $lists | cksum)"
  [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
  echo "Installing into .venv: once, some minutes, about 5 GB with torch ..."
  [ -t 1 ] && quiet=
  # not compiled: Python does it for what is imported, and most of these files never are
  if ! { .venv/bin/python -m pip install $quiet --no-compile \
           -r requirements.txt -r ci/requirements-test.txt -c ci/constraints.txt &&
         .venv/bin/python -m pip install $quiet --no-deps -e .; }; then
    echo "The installation failed (see above). With a network, run the same command again: it goes on." >&2
    return 1
  fi
  echo "$want" >"$stamp"
  echo "Installed ($SECONDS s)."
}

# limit SECONDS COMMAND...: end a command that hangs (exit code 124), where the system can
limit() {
  if command -v timeout >/dev/null; then timeout -k 30 "$@"; else shift && "$@"; fi
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -n "${TPT_NB_PYTHON:-}" ]; then
  PYTHON=$TPT_NB_PYTHON
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # for the kernels: tpt_nb need not be installed
else
  setup || exit 1
  PYTHON=$PWD/.venv/bin/python
fi

unset MPLBACKEND                  # that of a calling notebook would reach the kernels
export TQDM_DISABLE=1             # progress bars fill logs and stored outputs
export TPT_NB_HEADLESS=1          # static figures in place of widgets, whose state must not be stored
export PYTHONHASHSEED=0
export JUPYTER_PREFER_ENV_PATH=1  # the kernel "python3" is this environment's, not the user's
export TPT_NB_CACHE=${TPT_NB_CACHE:-$PWD/out/cache} # features, shared by the notebooks
