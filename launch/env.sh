# shellcheck shell=bash
# Sourced by worker.sh on every host: each variable with its reason. One that is set already is kept.
# Ranks and addresses are not set here: JAX takes them from the TPU VM's metadata, GKE or Slurm.

# Compiled programs beside the runs: a slice that was made again has an empty home, and its compiler is slow.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$WORKDIR")/compiled}

# GPUs: JAX takes 75 % of the memory at its start and never more. The rest is nobody's on a host of one's own.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# TPUs: with mesh.fsdp XLA cuts a product into one for each device's part of the parameters, to send the parts
# meanwhile. The parts are narrow (D / fsdp), which the compiler itself counts as slow: docs/results/compile.
export LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:---xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000}
