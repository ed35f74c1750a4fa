#!/bin/bash
# Rents what launch/sky.yaml says, trains a recipe, brings its run back, and stops the meter:
#
#   launch/sky.sh sentiment_r4 [options of `sky launch`, such as --gpus RTXA5000:2]
#
# Needs `sky` (pip install "skypilot[runpod]") with a cloud that `sky check` enables. However the
# training ends, its run is brought back first. Where that fails the machine stays, and the last
# lines say what to do; where this shell dies too, launch/sky.yaml's autostop takes it down.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=${1:?a recipe is needed, such as sentiment_r4}
shift
for program in sky rsync; do
  command -v "$program" >/dev/null || { echo "error: $program is not installed, and nothing was rented" >&2; exit 2; }
done
cluster=finlora-$(tr -c 'a-z0-9\n' '-' <<<"$recipe")
keep=120 # minutes that a machine waits whose run could not be brought back

# Without the prepared data: it is made from data/chat again where it is needed. A failed training
# may have no run, and a file may go while it is copied (24): checkpoints replace each other.
bring_back() {
  rsync -az --ignore-missing-args --exclude prepared "$cluster:sky_workdir/runs" . || [ $? -eq 24 ]
}

finish() {
  local status=$?
  [ -n "$trained" ] || status=$((status ? status : 130)) # a signal leaves 0 here
  trap - EXIT
  trap '' INT TERM HUP # what is copied is worth more than the seconds saved
  if ! bring_back; then
    sky autostop -y -i "$keep" --down "$cluster" || true
    cat >&2 <<END
error: the run could not be brought back, and $cluster was not taken down; it costs money until it is
  bring it back:    rsync -az --exclude prepared $cluster:sky_workdir/runs .
  then:             sky down -y $cluster   (by itself after $keep idle minutes, with the run on it)
  never came up?    sky status $cluster
END
    exit $((status ? status : 1))
  fi
  if ! sky down -y "$cluster"; then
    echo "error: the run is here, and $cluster is still up and costs money: sky down -y $cluster" >&2
    exit $((status ? status : 1))
  fi
  exit "$status"
}

trained=
trap finish EXIT
sky launch -y -c "$cluster" launch/sky.yaml --env "RECIPE=$recipe" \
  ${HF_TOKEN:+--secret HF_TOKEN} "$@"
trained=yes
