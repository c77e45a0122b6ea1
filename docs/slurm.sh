#!/usr/bin/env bash
# Train on machines of a SLURM cluster; start it in the folder of the repository:
#   sbatch docs/slurm.sh recipes/egfr.py --data.manifest slides.csv --parallel.strategy fsdp
#SBATCH --job-name=slidescale
#SBATCH --nodes=2
# One torchrun per machine, which starts one rank per GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
. .venv/bin/activate
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a machine need ports of their own.
port=$((20000 + SLURM_JOB_ID % 10000))
# srun does not take --cpus-per-task over from sbatch.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_machine:$port" \
    "$@"
