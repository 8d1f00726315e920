# What both scripts for Slurm share; they source it.

# run_in_slurm PARTITION JOB_NAME PROGRAM [ARGUMENTS]: one process per GPU.
run_in_slurm() {
    local partition="$1" job="$2" gpus="${GPUS:-8}" per_node srun_args
    per_node="${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}"
    read -ra srun_args <<<"${SRUN_ARGS:-}"
    PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec srun \
        --partition="$partition" --job-name="$job" \
        --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        "${srun_args[@]}" \
        "${PYTHON:-python}" -u "${@:3}" --launcher slurm
}
