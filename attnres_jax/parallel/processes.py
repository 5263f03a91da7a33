"""Several processes as one run: joining them, and which of them speaks.

A process joins where JAX detects a cluster (TPU VMs, GKE, Slurm, ...) or where the environment asks for one:
JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as launch/local_cluster.sh sets them.
"""

import os
from typing import Any

import jax
from jax.experimental import multihost_utils

from attnres_jax.configs import UserError

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead and the others stop."""


class ClusterError(UserError):
    """Processes that could not be joined; says what to set."""


def join() -> None:
    """Join the other processes, if there are any; nothing where there is no cluster."""
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**named(), **limits)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):  # no cluster: alone
            raise ClusterError(f"the processes could not be joined: {error}") from None


def named() -> dict[str, Any]:
    """Number and count of the processes, where the environment names the address to meet at."""
    asked = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in os.environ]
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        if asked:
            raise ClusterError(f"{asked[0]} is set, but not JAX_COORDINATOR_ADDRESS: set it to HOST:PORT")
        return {}
    return {"num_processes": _number("JAX_NUM_PROCESSES"), "process_id": _number("JAX_PROCESS_ID")}


def first() -> bool:
    """Whether this process is the one that writes logs and speaks."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The first process's number, on all of them; all must call it."""
    return int(multihost_utils.broadcast_one_to_all(number))


def meet(name: str) -> None:
    """Go on when all processes have come here."""
    multihost_utils.sync_global_devices(name)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ClusterError(f"{variable} = {text!r} must be a whole number beside JAX_COORDINATOR_ADDRESS")
    return int(text)
