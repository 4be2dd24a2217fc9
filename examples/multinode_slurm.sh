#!/usr/bin/env bash
# Several nodes with SLURM, one task per GPU. From the root of the clone:
#
#   sbatch examples/multinode_slurm.sh --data.folder=/data/tokens
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 examples/multinode_slurm.sh --data.folder=/data/tokens
#
# CONFIG is the config to train (configs/gpt_160m_multinode.yaml). Arguments override its values.
#SBATCH --job-name=gpt_160m
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
# SLURM signals every replica 90 seconds before the time limit. Lightning saves the consensus and requeues the job.
#SBATCH --signal=SIGUSR1@90
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this script: change to the folder from which sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# srun starts the tasks. Lightning reads rank and address of the first node from SLURM's variables.
exec srun python -m lightning_curvadion fit --config "${CONFIG:-configs/gpt_160m_multinode.yaml}" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
