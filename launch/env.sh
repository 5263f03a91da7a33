# shellcheck shell=bash
# Sourced by worker.sh on every host: each variable with its reason. One that is set already is kept.
# Ranks and addresses are not set here: JAX takes them from the TPU VM's metadata, GKE or Slurm.

# Compiled programs beside the runs: a slice that was made again has an empty home, and its compiler is slow.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$WORKDIR")/compiled}

# GPUs: JAX takes 75 % of the memory at its start and never more. The rest is nobody's on a host of one's own.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
