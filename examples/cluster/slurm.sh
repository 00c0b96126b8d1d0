#!/bin/bash
# Traces photos on several nodes: sbatch slurm.sh. If preempted or out of time, the job is requeued and resumes.
# Nodes without GPUs: sbatch --gpus-per-node=0 slurm.sh
#SBATCH --job-name=spade-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --no-kill

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

photos=${PHOTOS:-$HOME/photos}
out=${OUT:-$HOME/traces}
options=(--model demo --solver sparsegpt)

device=${SLURM_GPUS_ON_NODE:+cuda}

# Ray accepts commands only with this token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex())')
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

host=$(hostname -I | cut -d' ' -f1)
port=$((20000 + SLURM_JOB_ID % 10000))
node=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --object-store-memory 100000000)
ray start --head --node-ip-address "$host" --port "$port" --include-dashboard false "${node[@]}" || exit
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes "$others" --ntasks "$others" --exclude "$SLURMD_NODENAME" --cpus-per-task "$SLURM_CPUS_PER_TASK" --no-kill \
        ray start --block --address "$host:$port" "${node[@]}" &
fi
timeout 120 python - "$host:$port" "$SLURM_JOB_NUM_NODES" <<'END'  # nodes that join later get no workers
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
while len(ray.nodes()) < int(sys.argv[2]):
    time.sleep(1)
END

spade-fast batch "$photos" --out "$out" "${options[@]}" --device "${device:-cpu}" \
    --engine ray --address "$host:$port" &
wait $! || wait $!  # the trap interrupts the first wait
