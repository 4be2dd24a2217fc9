#!/usr/bin/env bash
# Several nodes with SLURM, one task a GPU. From the root of the clone:
#
#   sbatch examples/multinode_slurm.sh --data.folder=/data/tokens
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 examples/multinode_slurm.sh --data.folder=/data/tokens
#
# CONFIG says what to train (configs/gpt_160m_multinode.yaml); arguments are passed on and overrule it.
#SBATCH --job-name=gpt_160m
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
# A minute and a half before the time is up every replica hears of it: Lightning saves the consensus and requeues the job.
#SBATCH --signal=SIGUSR1@90
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this script, in the folder it was called from.
cd "${SLURM_SUBMIT_DIR:?start me with sbatch}"

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# srun starts the tasks and tells each its rank; Lightning reads it, and the address of the first node.
exec srun python -m lightning_curvadion fit --config "${CONFIG:-configs/gpt_160m_multinode.yaml}" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
