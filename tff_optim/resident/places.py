"""The place that the arguments of a `ResidentProcess` ask for."""

from collections.abc import Sequence
from typing import Any

import attrs
import tensorflow_federated as tff

from tff_optim.devices import DevicePolicy, select_device
from tff_optim.resident import parts as parts_lib
from tff_optim.resident.clients.in_process import cohort as local
from tff_optim.resident.clients.in_workers.cohort import WorkerCohort
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.graphs.imported import ImportedComputation, as_function
from tff_optim.resident.in_process.place import DevicePlace
from tff_optim.resident.in_worker.place import WorkerPlace
from tff_optim.resident.place import Place
from tff_optim.torch_optimizer import NODE


@attrs.frozen
class Settings:
    """The arguments of a `ResidentProcess`, checked."""

    device: str | DevicePolicy | None
    server_device: str | DevicePolicy | None
    workers: int | Sequence[str] | None
    clients_per_step: int | None
    compile_step: bool | None
    heartbeat: float
    start_timeout: float

    def __attrs_post_init__(self) -> None:
        _check_positive("heartbeat", self.heartbeat)
        _check_positive("start_timeout", self.start_timeout)
        _check_workers(self.workers)
        number = self.clients_per_step
        if number is not None and (
            not isinstance(number, int) or isinstance(number, bool) or number < 1
        ):
            raise ValueError(
                f"`clients_per_step` must be a positive integer or None; found {number!r}."
            )
        if not isinstance(self.compile_step, bool | None):
            raise ValueError(
                f"`compile_step` must be True, False or None; found {self.compile_step!r}."
            )
        if self.device is not None and self.workers is not None:
            raise ValueError(
                "`device` must be left out where `workers` are asked for; found "
                f"device={self.device!r}, workers={self.workers!r}. On a device of the Python "
                "process there are no workers; `server_device` is for the server's half alone."
            )
        if self.device is not None and self.server_device is not None:
            raise ValueError(
                f"`device` must be left out where `server_device` is given; found {self.device!r} "
                f"and {self.server_device!r}. `device` places clients and server alike."
            )
        if self.compile_step is not None and self.device is None and self.server_device is None:
            raise ValueError(
                "`compile_step` must be None without `device` or `server_device`; found "
                f"{self.compile_step!r}. TFF's worker has no XLA."
            )


def build_place(process: tff.learning.templates.LearningProcess, settings: Settings) -> Place:
    """Builds the place for a process.

    Raises:
      ValueError: There is no such device, or the process cannot be split as asked.
    """
    number = settings.clients_per_step
    workers = Workers(
        _check_workers(settings.workers),
        settings.heartbeat,
        settings.start_timeout,
        hold_states=settings.server_device is None,
    )
    if settings.device is None and settings.server_device is None:
        _refuse_torch(process)
        return WorkerPlace(process, workers, number)
    parts = parts_lib.cut(process.next)
    if settings.device is not None:
        device = _select("device", settings.device)
        clients = local.Cohort(parts, device, number)
        return DevicePlace(process, parts, device, clients.add_up, settings.compile_step)
    server_device = _select("server_device", settings.server_device)
    merge = as_function(ImportedComputation(parts.merge, server_device))
    there = WorkerCohort(parts, workers, number, merge)
    return DevicePlace(process, parts, server_device, there.add_up, settings.compile_step, workers)


def _refuse_torch(process: tff.learning.templates.LearningProcess) -> None:
    """Raises if a step of torch is in a process that TFF's worker is to run."""
    if NODE.encode() in tff.framework.serialize_computation(process.next).SerializeToString():
        raise ValueError(
            "`server_device` must be given for a process with an optimizer of torch, which runs in "
            "the Python process; found None. Give `server_device='CPU:0'`, or build the process with "
            "`build_keras_optimizer` or `build_optax_optimizer`."
        )


def _select(name: str, device: Any) -> str | None:
    try:
        return select_device(device)
    except (TypeError, ValueError) as error:
        message = str(error).replace("`device`", f"`{name}`")
        raise type(error)(message) from error


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"`{name}` must be a positive number of seconds; found {value!r}.")


def _check_workers(workers: int | Sequence[str] | None) -> list[str | None]:
    if workers is None:
        return [None]
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return [None] * workers
    if isinstance(workers, list | tuple) and workers:
        for target in workers:
            host, _, port = target.rpartition(":") if isinstance(target, str) else ("", "", "")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"`workers` must name each worker 'host:port'; found {target!r}.")
        if len(set(workers)) < len(workers):
            raise ValueError(f"`workers` must name each worker once; found {workers!r}.")
        return list(workers)
    raise ValueError(
        "`workers` must be None, a positive number of local workers, or a list of 'host:port'; "
        f"found {workers!r}."
    )
