"""Whether a verb is one of several processes that train together, on one host or many."""

import glob
import os

from lm.errors import UserError


def is_one_of_many(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether this process trains together with others: by its flags, or as a scheduler tells.

    Raises:
      UserError: flags that do not fit each other.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise UserError(f"--{missing[0]} is missing: give --coordinator_address, --num_processes and --process_id together")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} must lie between 0 and --num_processes={num_processes} less one")
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator_address={coordinator_address} must be HOST:PORT, as in node1:9876")
        return num_processes > 1
    if "SLURM_STEP_NODELIST" in os.environ:
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1
    return _num_tpu_hosts() > 1


def _num_tpu_hosts():
    """Of the slice that this machine belongs to: GKE tells in a variable, a Cloud TPU VM by its metadata server."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return len(os.environ[name].split(","))
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return 1
    import urllib.request  # not for every --help

    request = urllib.request.Request(
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return len(answer.read().decode().split(","))
    except OSError:
        return 1
