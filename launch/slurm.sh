#!/usr/bin/env bash
# A full-size run on a cluster:  sbatch --export=ALL,PRESET=imagenet256-32,DATA=/data/imagenet launch/slurm.sh
# Killed by the time limit, it is put back into the queue and goes on from its last checkpoint.
#SBATCH --job-name=textok
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

: "${PRESET:=imagenet256-32}" "${DATA:=data/imagenet}" "${CAPTIONS:=runs/captions}" "${OUTPUT_DIR:=runs/$PRESET}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun .venv/bin/python -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m textok_mini.train "$PRESET" data="$DATA" data.captions_from="$CAPTIONS" training.workers=12 output_dir="$OUTPUT_DIR" &
wait
