#!/usr/bin/env bash
# Nsight Compute on one case.
#   ncu.sh record REPORT CASE [options of run_case.py]   profiles the kernels of its range into REPORT.ncu-rep
#   ncu.sh read REPORT.ncu-rep                           prints its metrics as CSV, a row for each kernel
# PYTHON: the interpreter that has sbkernels; default: python3.
set -euo pipefail
PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
if ! command -v ncu > /dev/null; then
    echo "ncu is neither on PATH nor in CUDA_HOME or /usr/local/cuda: the package nsight-compute (Debian, NVIDIA) brings it" >&2
    exit 2
fi
action=$1 report=$2 python=${PYTHON:-python3}
shift 2
if [ "$action" = read ]; then
    exec ncu --import "$report" --page raw --csv
fi
counted=$("$python" -m sbkernels.profiles.counters)
range=${counted%% *} metrics=${counted#* }
# Clocks as they are, since times are; all processes, since kernels may be compiled by others.
command=(ncu --clock-control none --nvtx --nvtx-include "$range"
    --target-processes all --import-source yes --set full --metrics "$metrics"
    --force-overwrite --export "$report" "$python" -m sbkernels.profiles.run_case "$@")
printf '%q ' "${command[@]}"
echo
exec "${command[@]}"
