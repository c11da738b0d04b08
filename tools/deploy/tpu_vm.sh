#!/usr/bin/env bash
# Serves a run on a Cloud TPU VM, reached through an SSH tunnel: tools/deploy/tpu_vm.sh NAME ZONE runs/mine [v5litepod-1]
# Ends with: gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail
if [ $# -lt 3 ]; then echo "usage: $0 NAME ZONE WORKDIR [ACCELERATOR]" >&2; exit 2; fi
name=$1 zone=$2 workdir=$3 accelerator=${4:-v5litepod-1}
cd "$(dirname "$0")/../.."
if [ ! -d "$workdir/checkpoints" ]; then echo "$workdir is not the folder of a run" >&2; exit 2; fi

gcloud compute tpus tpu-vm describe "$name" --zone="$zone" > /dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$accelerator" --version=v2-alpha-tpuv5-lite
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
tar -czf "$files/source.tgz" pyproject.toml README.md LICENSE configs jaxlm
tar -czf "$files/model.tgz" -C "$workdir" .
gcloud compute tpus tpu-vm scp "$files/source.tgz" "$files/model.tgz" "$name:" --zone="$zone"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command='
  set -e
  mkdir -p source model && tar -xzf source.tgz -C source && tar -xzf model.tgz -C model
  [ -d venv ] || python3.11 -m venv venv || python3 -m venv venv
  venv/bin/pip install --quiet "./source[serve,tpu]"
  systemctl --user stop jaxlm 2> /dev/null || true
  systemd-run --user --unit=jaxlm venv/bin/jaxlm serve --workdir=model --port=8000 --rows=128 --cache_gib=8
  until curl -sf http://127.0.0.1:8000/health; do sleep 5; done'
echo "http://127.0.0.1:8000 until Ctrl-C; it goes on serving there"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" -- -N -L 8000:127.0.0.1:8000
