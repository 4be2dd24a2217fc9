#!/usr/bin/env bash
# Several nodes with torchrun: the same command on every node, but for its rank.
#
#   NODES=4 GPUS=8 NODE_RANK=0 MASTER_ADDR=node0 examples/multinode_torchrun.sh --data.folder=/data/tokens
#
# NODES        nodes of the job
# GPUS         processes per node, one a GPU
# NODE_RANK    this node, from 0
# MASTER_ADDR  name or address of node 0, which all nodes reach; MASTER_PORT is a port that is free there (29500)
# CONFIG       what to train (configs/gpt_160m_multinode.yaml); arguments are passed on and overrule it
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?how many nodes}" "${GPUS:?how many GPUs a node has}" "${NODE_RANK:?which node this is, from 0}"
: "${MASTER_ADDR:?the address of node 0}"

# For restarts after a failure add --max-restarts, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
exec python -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE_RANK" --nproc-per-node="$GPUS" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    -m lightning_curvadion fit --config "${CONFIG:-configs/gpt_160m_multinode.yaml}" \
    --trainer.num_nodes="$NODES" --trainer.devices="$GPUS" "$@"
