#!/usr/bin/env bash
# Nsight Systems on one case.
#   nsys.sh record REPORT CASE [options of run_case.py]  traces its range into REPORT.nsys-rep
#   nsys.sh read REPORT.nsys-rep                         prints its kernels as CSV, a row for each
# PYTHON: the interpreter that has sbkernels; default: python3. SBKERNELS_NVTX=1 (set here) names each pass in the timeline.
set -euo pipefail
PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
if ! command -v nsys > /dev/null; then
    echo "nsys is neither on PATH nor in CUDA_HOME or /usr/local/cuda: the package nsight-systems-cli (NVIDIA) brings it" >&2
    exit 2
fi
action=$1 report=$2 python=${PYTHON:-python3}
shift 2
if [ "$action" = read ]; then
    exec nsys stats --report cuda_gpu_kern_sum --format csv --force-export true "$report"
fi
export SBKERNELS_NVTX=1
# The range's end stops the trace, not the program.
command=(nsys profile -c cudaProfilerApi --capture-range-end stop -t cuda,nvtx
    --force-overwrite true --output "$report" "$python" -m sbkernels.profiles.run_case "$@")
printf '%q ' "${command[@]}"
echo
exec "${command[@]}"
