"""References to values that live in a worker, as TFF's own value references."""

import asyncio
import threading
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.in_worker import handover
from tff_optim.resident.in_worker.host import Executor


class Resident:
    """A value in a worker; dropping the last reference to it frees its memory there.

    Args:
        carrier: What moves values of its type.
        executor: The executor that holds it.
        value: TFF's handle of it.
    """

    def __init__(self, carrier: handover.Carrier, executor: Executor, value: Any):
        self.carrier = carrier
        self.executor = executor
        self.value = value
        self._fetched: dict[int, Any] = {}
        self._lock = threading.Lock()

    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""
        return self.executor.host.run(
            lambda: handover.fetch(self.carrier, self.executor, self.value)
        )

    def fetch_leaf(self, index: int) -> Any:
        """Brings one leaf to Python; the others come along, each to be asked for once."""
        with self._lock:
            if index not in self._fetched:
                self._fetched = dict(enumerate(self.fetch()))
            return self._fetched.pop(index)

    def references(self) -> Any:
        """The value's structure with a reference at each leaf."""
        return leaves.pack(
            [Reference(self, i) for i in range(len(self.carrier.leaves))], self.carrier.type
        )


class Reference(tff.program.MaterializableValueReference):
    """One tensor of a value that lives in a worker."""

    def __init__(self, resident: Resident, index: int):
        self.resident = resident
        self.index = index

    @property
    def type_signature(self) -> Any:
        """The `tff.TensorType` of the tensor."""
        return self.resident.carrier.leaves[self.index].type

    async def get_value(self) -> Any:
        """Brings the tensor to Python."""
        return await asyncio.to_thread(self.resident.fetch_leaf, self.index)

    def __repr__(self) -> str:
        leaf = self.resident.carrier.leaves[self.index]
        return f"<{leaf.type} at {leaf.name} in the {self.resident.executor.host.worker.name}>"


def resident_of(state: object, type_spec: tff.Type) -> Resident | None:
    """Returns the value whose references `state` is made of, all of them and in order.

    None means that the state holds plain values, or references of more than one value.
    """
    found = leaves.flatten(state, type_spec)
    if not found or not all(isinstance(x, Reference) for x in found):
        return None
    resident = found[0].resident
    if any(x.resident is not resident or x.index != i for i, x in enumerate(found)):
        return None
    return resident


def plain_leaves(state: object, type_spec: tff.Type) -> list[Any]:
    """Lists the leaves of a state as plain values, wherever they are now."""
    resident = resident_of(state, type_spec)
    if resident is not None:
        return resident.fetch()
    return [
        x.resident.fetch_leaf(x.index) if isinstance(x, Reference) else x
        for x in leaves.flatten(state, type_spec)
    ]
