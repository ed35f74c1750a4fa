#!/bin/bash
# Rents what launch/sky.yaml says, trains a recipe, brings its run back, and stops the meter:
#
#   launch/sky.sh sentiment_r4 [options of `sky launch`, such as --gpus RTXA5000:2]
#
# Needs `sky` (pip install "skypilot[runpod]") with a cloud that `sky check` enables. The machine is
# taken down whatever happens; where this shell dies too, launch/sky.yaml's autostop does it.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=${1:?a recipe is needed, such as sentiment_r4}
shift
cluster=finlora-$(tr -c 'a-z0-9\n' '-' <<<"$recipe")

trap 'sky down -y "$cluster"' EXIT
sky launch -y -c "$cluster" launch/sky.yaml --env "RECIPE=$recipe" \
  ${HF_TOKEN:+--secret HF_TOKEN} "$@"
# Without the prepared data: it is made from data/chat again where it is needed.
rsync -az --exclude prepared "$cluster:sky_workdir/runs/" runs/
