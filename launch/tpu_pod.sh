#!/bin/bash
# Trains one model on every host of a Cloud TPU slice: launch/tpu_pod.sh NAME ZONE --config=configs/scale/1b.py \
#     --config.data.source=text --config.data.path=/mnt/shared/text --workdir=/mnt/shared/run
#
# The project must stand in ~/lm on every host, set up there with `make .venv/installed && .venv/bin/pip install -e '.[tpu]'`, and
# the workdir on a folder that all hosts see (Filestore, or a bucket through gcsfuse). The hosts find each other. Run the same
# command again after a preemption, and it goes on from the last checkpoint.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/lm && .venv/bin/python -m launch.train $(printf '%q ' "$@")"
