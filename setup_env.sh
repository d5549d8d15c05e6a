#!/usr/bin/env bash
# One command from a fresh clone to a working environment; see usage() below.
# Runs with the bash 3.2 of macOS too. pip's own settings (mirrors, proxies, cache) are left alone.
set -euo pipefail
unset CDPATH # or cd may lead to another folder

readonly POETRY=2.5.1 POETRY_EXPORT=1.10.1 # exact: they read the lock and build the package
readonly FREE_GB=10                        # about 7 GB installed, the rest while pip unpacks

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
log=$venv/setup.log
marker=$venv/made-by-setup_env # written first: this .venv is ours, so we may delete it
stamp=$venv/state              # one line: the packages are whole; all lines: finished
readonly root venv log marker stamp

usage() {
  cat <<'END'
Usage: bash setup_env.sh [--test | --write-checksums | --help]

Makes .venv beside this script with exactly the packages of poetry.lock (all groups and extras,
hashes checked), installs parscale-ear into it in editable form and verifies SHA256SUMS.
Running it again takes seconds, follows a changed lock and repairs an interrupted run.

  --test             set up, then run the tests
  --write-checksums  only rewrite SHA256SUMS (after a change to ci/, the weights, the lock or
                     pyproject.toml)
  --help             this text

PYTHON=/path/to/python chooses the interpreter (3.10 to 3.13). To start over: rm -rf .venv
Exit status: 0 done, 1 a step failed, 2 wrong use or unsuitable machine.
END
}

say() { printf 'setup_env: %s\n' "$*"; }
die() { # die STATUS MESSAGE: every failure is one line on stderr
  local status=$1
  shift
  printf 'setup_env: %s\n' "$*" >&2
  exit "$status"
}

# --- checksums ----------------------------------------------------------------------------------

if command -v sha256sum >/dev/null; then sha256=(sha256sum); else sha256=(shasum -a 256); fi

write_checksums() { # the weights, the validation scripts, and what decides the environment
  cd "$root"
  [ -d parscale_ear/weights ] && [ -d ci ] || die 1 "parscale_ear/weights or ci is missing in $root"
  {
    find parscale_ear/weights ci -type f ! -name '.*' ! -name '*.pyc' ! -name '*.part'
    printf '%s\n' poetry.lock pyproject.toml
  } | LC_ALL=C sort | tr '\n' '\0' | xargs -0 "${sha256[@]}" >SHA256SUMS.part
  mv SHA256SUMS.part SHA256SUMS
  say "wrote SHA256SUMS ($(wc -l <SHA256SUMS | tr -d ' ') files)"
}

verify_checksums() {
  local report
  cd "$root"
  [ -s SHA256SUMS ] || die 1 "SHA256SUMS is missing; restore it: git checkout SHA256SUMS"
  if ! report=$("${sha256[@]}" -c SHA256SUMS 2>/dev/null); then
    die 1 "SHA256SUMS does not match:$(printf '%s\n' "$report" | sed -n 's/: FAILED.*//p' |
      tr '\n' ' ' | sed 's/^/ /')- restore with git checkout, or after a change on purpose:" \
      "bash setup_env.sh --write-checksums"
  fi
  say "SHA256SUMS: $(printf '%s\n' "$report" | wc -l | tr -d ' ') files match"
}

# --- Python -------------------------------------------------------------------------------------

# Prints "VERSION PATH" of an interpreter, a virtual environment's replaced by the one it was made
# from (we may be about to delete it). Fails for what does not run, such as a pyenv shim without
# its version.
probe() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3],
      getattr(sys, "_base_executable", None) or sys.executable)' 2>/dev/null </dev/null
}

pick_python() { # sets python and python_version
  local candidate found seen="" remedy
  remedy="install one, or name it: PYTHON=/path/to/python3.12 bash setup_env.sh"
  if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
    remedy="point PYTHON at one of these, or unset it"
  elif [ -e "$stamp" ]; then # keep the interpreter of a finished .venv
    set -- "$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10
  else
    set -- python3 python3.13 python3.12 python3.11 python3.10
  fi
  for candidate in "$@"; do
    found=$(probe "$candidate") || continue
    read -r python_version python <<<"$found"
    [ -n "$python" ] || continue
    case $python_version in 3.10.* | 3.11.* | 3.12.* | 3.13.*) return ;; esac
    seen="${seen:+$seen, }$python_version ($candidate)"
  done
  die 2 "Python 3.10 to 3.13 is needed, found ${seen:-none that runs${PYTHON:+ ($PYTHON)}}; $remedy"
}

# --- the environment ----------------------------------------------------------------------------

# What .venv must have been finished for. A change in the first line means a new .venv (its scripts
# hold absolute paths), a change in the others only an update.
wanted_stamp() {
  cd "$root"
  printf 'python %s, poetry %s+%s, in %s\n' "$python_version" "$POETRY" "$POETRY_EXPORT" "$root"
  "${sha256[@]}" poetry.lock pyproject.toml
}

# step WHAT COMMAND...: run it with its output in the log; on failure one line that says why.
step() {
  local what=$1 output
  shift
  say "$what"
  output=$venv/step.log
  if "$@" >"$output" 2>&1 </dev/null; then
    cat "$output" >>"$log"
    return
  fi
  cat "$output" >>"$log"
  die 1 "failed: $what ($(reason "$output")); details: $log"
}

reason() {
  if grep -qi 'no space left' "$1"; then
    echo "the disk is full"
  elif grep -qi 'changed significantly since poetry.lock' "$1"; then
    echo "poetry.lock does not belong to this pyproject.toml: run 'poetry lock'"
  elif grep -qi 'do not match the hashes' "$1"; then
    echo "a download does not have the hash in poetry.lock"
  elif grep -qiE 'ConnectionError|ConnectTimeout|ReadTimeout|timed out|Failed to establish|ProxyError|Temporary failure in name' "$1"; then
    echo "no connection to the package index: check the network and pip's settings, then run again"
  elif grep -qi 'no matching distribution' "$1"; then
    echo "the package index does not offer it: check pip's settings, then run again"
  elif grep -qi 'ensurepip' "$1"; then
    echo "this Python lacks venv: on Debian and Ubuntu, apt-get install python3-venv"
  else
    echo "the end of the log says why"
  fi
}

start_fresh() {
  local free
  if [ -e "$venv" ]; then
    [ -e "$marker" ] || die 2 ".venv was not made by this script; move it away, then run again"
    say "replacing .venv (unfinished, or made for another Python or place)"
    rm -rf "$venv"
  fi
  free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$FREE_GB" ] ||
    die 2 "the disk is too full: $free GB free in $root, $FREE_GB GB needed"
  mkdir "$venv"
  : >"$marker"
}

install_env() { # install_env WANTED_STAMP
  # Unpack beside the target: a small /tmp is a common cause of failure.
  export TMPDIR=$venv/tmp
  mkdir -p "$TMPDIR"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install)

  if [ ! -e "$venv/poetry" ]; then
    step "making .venv with Python $python_version" "$python" -m venv "$venv"
    step "installing Poetry $POETRY beside it" make_poetry
  fi
  step "reading poetry.lock" "$venv/poetry/bin/poetry" --directory "$root" --no-interaction \
    export --all-groups --all-extras --output "$venv/requirements.txt"
  rm -f "$stamp" # an interrupted pip may leave a package half-installed yet listed
  step "installing the locked packages (minutes, and GBs, the first time; watch: tail -f .venv/step.log)" \
    "${pip[@]}" --no-deps --require-hashes -r "$venv/requirements.txt"
  local strangers
  strangers=$(beyond_the_lock "$venv/requirements.txt")
  if [ -n "$strangers" ]; then
    # shellcheck disable=SC2086 # names of packages, one a word
    step "removing what poetry.lock does not have: $strangers" \
      "$venv/bin/python" -m pip --disable-pip-version-check --no-input uninstall --yes $strangers
  fi
  # A failure from here on (a mistake in pyproject.toml, say) need not cost a new .venv.
  head -n 1 <<<"$1" >"$stamp"
  # poetry-core comes with the lock, so this needs neither a network nor an isolated build.
  step "installing parscale-ear in editable form" \
    "${pip[@]}" --no-deps --no-index --no-build-isolation --editable "$root"
  step "checking that the packages fit together" "$venv/bin/python" -m pip check
  rm -rf "$TMPDIR" "$venv/step.log"
  unset TMPDIR
  printf '%s\n' "$1" >"$stamp"
}

beyond_the_lock() { # names of the installed packages that are not in requirements file $1
  "$venv/bin/python" - "$1" <<'END'
import importlib.metadata, re, sys

def normal(name):
    return re.sub("[-_.]+", "-", name).lower()

lines = open(sys.argv[1], encoding="utf-8")
kept = {normal(m[0]) for m in (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in lines) if m}
kept |= {"pip", "setuptools", "wheel", "parscale-ear"}  # of venv, and the project
found = {normal(d.metadata["Name"]) for d in importlib.metadata.distributions()}
print(*sorted(found - kept))
END
}

make_poetry() { # an environment of its own: Poetry's packages must not mix with the project's
  "$python" -m venv "$venv/poetry" &&
    "$venv/poetry/bin/python" -m pip --disable-pip-version-check --no-input install \
      "poetry==$POETRY" "poetry-plugin-export==$POETRY_EXPORT"
}

set_up() {
  local wanted finished="" versions
  # Foreign packages in sys.path would count as installed.
  unset PYTHONPATH PYTHONHOME
  export PYTHONNOUSERSITE=1
  pick_python
  wanted=$(wanted_stamp)
  if "$venv/bin/python" -c '' 2>/dev/null; then
    finished=$(cat "$stamp" 2>/dev/null || true)
  fi
  if [ "$finished" = "$wanted" ]; then
    say ".venv is up to date"
  else
    trap 'die 130 "interrupted; the next run repairs .venv"' INT TERM
    if [ "${finished%%$'\n'*}" != "${wanted%%$'\n'*}" ]; then start_fresh; fi
    install_env "$wanted"
    trap - INT TERM
  fi
  versions=$("$venv/bin/python" -W ignore -c '
import platform, torch
gpu = "GPU: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
cuda = torch.version.cuda or "not built in"
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {cuda}, {gpu}")
' 2>>"$log") || die 1 "torch does not start; details: $log"
  say "$versions"
  verify_checksums
}

[ $# -le 1 ] || die 2 "one option at most, not '$*'; see bash setup_env.sh --help"
case ${1:-} in
  --help | -h) usage ;;
  --write-checksums) write_checksums ;;
  --test)
    set_up
    cd "$root"
    exec "$venv/bin/python" -m pytest
    ;;
  "")
    set_up
    say "ready: source .venv/bin/activate"
    ;;
  *) die 2 "unknown option '$1'; see bash setup_env.sh --help" ;;
esac
