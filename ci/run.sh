#!/usr/bin/env bash
# The whole validation in order: sanity, latency, quality, ablation, streams, generation, verdict, report.
# A failing step does not hide the later ones; the exit code tells: 0 all passed, 1 a target was
# missed, 2 wrong use or missing data.
set -uo pipefail
unset CDPATH # or cd may lead to another folder

usage() {
  cat <<'END'
Usage: bash ci/run.sh [--quick] [--device auto|cpu|cuda]

Validates the shipped autoencoder (M2-1 sanity, M2-2 latency, M2-3 quality, M3-1 ablation),
the parallel streams of VAR (M2-4) and the shipped generator (M3-2), and writes
results/*.json and results/report.html. Sets up .venv first if it is not there.

  --quick   the same chain with fewer samples, and no verdict where those are too few:
            timings, streams' memory, what the hybrid gains, which of its branches are used,
            the sharp decoder's distance; nor on what is on record (the model card, trainings
            that are compared)

Environment: CI_NUM_RUNS (timed runs a batch size), CI_FID_SAMPLES (pictures),
CI_STREAM_RUNS (timed rounds of the streams), CI_GENERATION_SAMPLES (drawn pictures),
CI_FEATURES (auto, inception or efficientnet-lite1: whose features distances are taken in),
REF_DIR (folder or tar of photographs to measure on), CI_PYTHON (an interpreter that has all that
is needed: nothing is set up then).
END
}

quick=()
device=auto
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=(--quick) ;;
    --device)
      [ $# -ge 2 ] || { echo "run.sh: --device needs a value" >&2; exit 2; }
      device=$2
      shift
      ;;
    --help | -h)
      usage
      exit 0
      ;;
    *)
      echo "run.sh: unknown option '$1'; see bash ci/run.sh --help" >&2
      exit 2
      ;;
  esac
  shift
done

trap 'echo "run.sh: stopped" >&2; exit 130' INT TERM
case ${REF_DIR:-} in
  "") unset REF_DIR ;;
  /*) ;;
  *) export REF_DIR=$PWD/$REF_DIR ;; # as the caller sees it
esac
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${CI_PYTHON:-}
case $python in
  "" | /*) ;;
  */*) python=$called_from/$python ;;
esac
if [ -z "$python" ]; then
  bash setup_env.sh || exit 2
  python=.venv/bin/python
fi
if ! "$python" -c 'import matplotlib, numpy, PIL, piq, safetensors, scipy, skimage, torch, torchvision, tqdm'; then
  echo "run.sh: $python lacks what is needed; name another CI_PYTHON, or none" >&2
  exit 2
fi
# What was asked for is looked at before an earlier run's files go.
CI_RUN=$("$python" -c '
import sys, uuid
from ci import _common as ci
sys.argv[0] = "run.sh"
code = ci.run(lambda _: ci.check_run(sys.argv[1]))
print(uuid.uuid4().hex)
sys.exit(code)' "$device") || exit 2
mkdir -p results || exit 2
export CI_RUN # in every report, so that those of one run are known to belong together
# What an earlier run left must not pass for this one's.
rm -f results/{sanity,latency,fid,ablation,streams,generation,summary}.json results/report.html || {
  echo "run.sh: the files of an earlier run in results cannot be removed" >&2
  exit 2
}

steps=("sanity.py ${quick[*]-}" "latency.py ${quick[*]-}" "fid_eval.py ${quick[*]-}"
  "ablation.py ${quick[*]-}" "streams.py ${quick[*]-}"
  "generation.py ${quick[*]-}" "validate_results.py" "report.py")
worst=0
verdict=2
bar="#######"
dots="......."
for index in "${!steps[@]}"; do
  read -r -a words <<<"${steps[$index]}"
  printf '\n[%s%s] %d/%d  %s\n' "${bar:0:index}" "${dots:index}" $((index + 1)) \
    ${#steps[@]} "${words[0]}"
  options=("${words[@]:1}")
  options+=(--device "$device")
  "$python" "ci/${words[0]}" ${options[@]+"${options[@]}"}
  code=$?
  case ${words[0]} in validate_results.py) verdict=$code ;; esac
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done

report="no report"
if [ -f results/report.html ]; then report="report: results/report.html"; fi
if [ ! -f results/summary.json ]; then worst=2; fi
printf '\n[%s] done in %d min %02d s; %s\n' "$bar" $((SECONDS / 60)) $((SECONDS % 60)) "$report"
case $worst in
  0) echo "all targets that could be measured here passed" ;;
  1) echo "a target was missed: see the table above" ;;
  *) echo "a step failed (exit code $worst, verdict $verdict): see its message above" ;;
esac
[ "$worst" -le 2 ] || worst=2
exit "$worst"
