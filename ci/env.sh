# Sourced by ci/run and ci/test: goes to the top of the repository, makes .venv once, and sets what
# headless runs need. What more than requirements.txt is to be installed says $LISTS. Afterwards $PYTHON is
# the interpreter and $CORES the number of cores. To use an environment of your own instead:
# TPT_NB_PYTHON=/path/to/python bash ci/test

unset CDPATH # it would send cd to another folder
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null

setup() { # setup LIST...: make .venv where there is none, install the lists that are not there yet
  local list want quiet=-qq
  if ! .venv/bin/python -c pass 2>/dev/null; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "python3 is $(python3 -V 2>&1 || true), but Python 3.11 or later is needed." >&2
      return 1
    fi
    rm -rf .venv
    python3 -m venv .venv || { rm -rf .venv; return 1; } # a half-made one would be taken for whole
  fi
  [ -t 1 ] && quiet=
  for list in "$@"; do
    local stamp=.venv/installed-${list//\//-}
    want="$PWD $(.venv/bin/python -V) $(cat "$list" ci/constraints.txt | cksum)"
    [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || continue
    echo "Installing $list into .venv: once, some minutes ..."
    small_torch
    if ! { install -r "$list" -c ci/constraints.txt && install --no-deps -e .; }; then
      echo "The installation failed (see above). With a network, run the same command again: it goes on." >&2
      return 1
    fi
    echo "$want" >"$stamp"
    echo "Installed ($SECONDS s)."
  done
}

# install ARG...: as pip install, with uv where there is one or where it comes in seconds: that takes
# half the time. Where uv does not get what it looks for (it does not read pip's settings), pip does it.
install() {
  local index
  if [ -z "${UV:-}" ]; then
    UV=$(command -v uv || true)
    [ -n "$UV" ] || ! .venv/bin/python -m pip install -qq --retries 0 --timeout 15 uv >/dev/null 2>&1 ||
      UV=.venv/bin/uv
    UV=${UV:-none}
    index=${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
  fi
  [ "$UV" = none ] || ! "$UV" pip install --python .venv/bin/python ${quiet:-} "$@" 2>/dev/null || return 0
  # not compiled: Python does it for what is imported, and most of these files never are
  .venv/bin/python -m pip install ${quiet:-} --no-compile "$@"
}

# Without a GPU the torch that comes without CUDA will do: 0.7 GB on the disk in place of 4.5. It lies
# on torch's own index; where that cannot be reached or has no such version, nothing is said, and the
# list below installs the usual one.
small_torch() {
  local pair
  case "$(uname -s)/$(uname -m)" in Linux/x86_64) ;; *) return 0 ;; esac # elsewhere there is no other
  [ ! -e /dev/nvidiactl ] || return 0
  ! .venv/bin/python -m pip show -q torch 2>/dev/null || return 0
  pair=$(sed -n 's/^\(torch\(vision\)\{0,1\}==[0-9.]*\)$/\1+cpu/p' ci/constraints.txt)
  .venv/bin/python -m pip install -qq --no-compile --retries 0 --timeout 15 $pair \
    --extra-index-url "${TPT_NB_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" \
    -c ci/constraints.txt >/dev/null 2>&1 || return 0
  .venv/bin/python -c "import torchvision" 2>/dev/null ||
    .venv/bin/python -m pip uninstall -qq -y torch torchvision
}

# An environment of the lowest versions that the lists allow of what they name (what that brings with
# it is the newest): $PYTHON is then its interpreter. Needs uv, which tells how low that is.
lowest_versions() {
  local lists="requirements.txt ci/requirements-test.txt" want stamp=.venv/lowest/installed
  want="$(.venv/bin/python -V) $(cat $lists | cksum)"
  if [ "$(cat $stamp 2>/dev/null)" != "$want" ]; then
    [ -n "${UV:-}" ] || install pip # finds uv, or gets it
    [ "$UV" != none ] || { echo "--lowest needs uv: pip install uv" >&2; exit 1; }
    echo "Installing the lowest versions into .venv/lowest: once, some minutes ..."
    .venv/bin/python -m venv --clear .venv/lowest
    "$UV" pip install -q --python .venv/lowest/bin/python --resolution lowest-direct \
      $(printf -- '-r %s ' $lists)
    "$UV" pip install -q --python .venv/lowest/bin/python --no-deps -e .
    echo "$want" >$stamp
  fi
  PYTHON=$PWD/.venv/lowest/bin/python
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
  setup requirements.txt ${LISTS:-} || exit 1
  PYTHON=$PWD/.venv/bin/python
fi

# One thread per process, and as many processes as there are cores: the last bits of a result hang on
# the number of threads, and must not hang on the machine.
CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
! command -v nproc >/dev/null || CORES=$(env -u OMP_NUM_THREADS nproc) # knows which of them are ours

unset PYTHONDONTWRITEBYTECODE     # images set it; each kernel would then compile all it imports: 15 s
unset MPLBACKEND                  # that of a calling notebook would reach the kernels
export TQDM_DISABLE=1             # progress bars fill logs and stored outputs
export TPT_NB_HEADLESS=1          # static figures in place of widgets, whose state must not be stored
export PYTHONHASHSEED=0
export JUPYTER_PREFER_ENV_PATH=1  # the kernel "python3" is this environment's, not the user's
export TPT_NB_CACHE=${TPT_NB_CACHE:-$PWD/out/cache} # features, shared by the notebooks
