#!/usr/bin/env bash
# Several nodes with torchrun. Run the same command on every node, each with its own rank.
#
#   NODES=4 GPUS=8 NODE_RANK=0 MASTER_ADDR=node0 examples/multinode_torchrun.sh --data.folder=/data/tokens
#
# NODES        number of nodes
# GPUS         processes per node, one per GPU
# NODE_RANK    rank of this node, from 0
# MASTER_ADDR  name or address of node 0, which all nodes can reach
# MASTER_PORT  a free port on node 0 (29500)
# CONFIG       the config to train (configs/gpt_160m_multinode.yaml); arguments override its values
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?set the number of nodes}" "${GPUS:?set the GPUs per node}" "${NODE_RANK:?set the rank of this node, from 0}"
: "${MASTER_ADDR:?set the address of node 0}"

# To restart after a failure, add --max-restarts and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
exec python -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE_RANK" --nproc-per-node="$GPUS" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    -m lightning_curvadion fit --config "${CONFIG:-configs/gpt_160m_multinode.yaml}" \
    --trainer.num_nodes="$NODES" --trainer.devices="$GPUS" "$@"
