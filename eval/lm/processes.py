"""Several processes, one a device, that share the requests of a run."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from models.errors import InputError

BACKEND = "gloo"
"""Only counts and finished answers are exchanged, which are on the CPU anyway."""

TIMEOUT = timedelta(weeks=52)
"""A process that is done waits for the slowest, and a decode may take days."""


def launch(devices: int, device: str | None) -> None:
    """Starts the other processes of a command with Lightning Fabric, unless torchrun, accelerate or srun has done so.

    Args:
        devices: Number of processes.
        device: The command's device; ``cpu`` keeps them off the GPUs.

    Raises:
        InputError: Fewer devices than processes.
    """
    if devices < 1:
        raise InputError("devices", devices, "a whole number of at least 1")
    if devices == 1 or _adopt_slurm():
        return
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # every process would introduce itself
    on_gpu = torch.cuda.is_available() and device != "cpu"
    cores = max(2, os.cpu_count() or 1)
    if not on_gpu and devices > cores:  # as many copies of the model would fill the memory, and none would get on
        raise InputError("devices", devices, f"at most {cores}, the processors here")
    try:
        strategy = DDPStrategy(process_group_backend=BACKEND, timeout=TIMEOUT)
        Fabric(accelerator="cuda" if on_gpu else "cpu", devices=devices, strategy=strategy).launch()
    except MisconfigurationException as error:
        raise InputError("devices", f"{devices} ({error})", f"at most {torch.cuda.device_count()}") from error


def join() -> tuple[int, int]:
    """Joins the processes this one was started with, whoever started them: Fabric, torchrun, accelerate or srun.

    Returns:
        Number of this process, and how many there are.
    """
    _adopt_slurm()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(BACKEND, timeout=TIMEOUT)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _adopt_slurm() -> bool:
    """Takes rank, device and address from SLURM's variables where srun started several tasks; whether it did."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if "WORLD_SIZE" in os.environ or not SLURMEnvironment.detect() or int(os.environ["SLURM_NTASKS"]) < 2:
        return False
    slurm = SLURMEnvironment()
    found = {
        "RANK": slurm.global_rank(), "LOCAL_RANK": slurm.local_rank(), "WORLD_SIZE": slurm.world_size(),
        "MASTER_ADDR": slurm.main_address, "MASTER_PORT": slurm.main_port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in found.items()})
    return True


def own_device(asked: str | None) -> str | None:
    """The device of this process: the one asked for, or with several processes on GPUs, its own.

    That is the GPU of its number on the machine, or the only one that it sees, as with ``srun --gpus-per-task=1``.

    Raises:
        InputError: No such device.
    """
    try:
        usable = asked is None or torch.device(asked).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        usable = False
    if not usable:
        raise InputError("device", repr(asked), "cpu | cuda | cuda:<n>, where there is such a GPU")
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and torch.cuda.is_available() and asked != "cpu":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0') if torch.cuda.device_count() > 1 else 0}"
    return asked


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in their order; waits for all of them."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def leave() -> None:
    """Ends the exchange between the processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
