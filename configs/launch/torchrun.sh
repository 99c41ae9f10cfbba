#!/usr/bin/env bash
# Run on every host at about the same time, with the same arguments but for the host's number:
#   NODES=2 NODE=0 FIRST=10.0.0.1 GPUS=8 configs/launch/torchrun.sh -c configs/quickstart/ppo.yaml -c configs/strategy/ddp.yaml
# NODES: how many hosts. NODE: which of them this is, from 0. FIRST: address of host 0. GPUS: of each host.
# Again with `--ckpt_path last` to go on. What the hosts must share: configs/launch/README.md.
set -euo pipefail
: "${NODES:?}" "${NODE:?}" "${FIRST:?}" "${GPUS:?}"
exec python -m torch.distributed.run \
  --shutdown-timeout 600 --nnodes "$NODES" --node-rank "$NODE" --master-addr "$FIRST" --master-port "${PORT:-29500}" --nproc-per-node "$GPUS" \
  -m rlhf_lightning fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS"
