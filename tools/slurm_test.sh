#!/usr/bin/env bash
# Test under Slurm:
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
# Set GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS for another size of the job.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" >&2
    exit 2
fi
here="$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"
. "$here/_slurm.sh"
run_in_slurm "$1" "$2" "$here/test.py" "$3" "$4" "${@:5}"
