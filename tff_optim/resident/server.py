"""The server's step on a device: from one set of variables into another."""

import logging
from typing import Any

import tensorflow as tf

from tff_optim import tracing
from tff_optim.devices import device_scope
from tff_optim.resident import leaves
from tff_optim.resident.graphs.imported import ImportedComputation
from tff_optim.resident.parts import RoundParts
from tff_optim.resident.state.variables import OnDevice, VariableSets

# Below, a step takes no longer than XLA's call; of many small tensors, compiling takes seconds.
_COMPILED_FROM_BYTES = 4 << 20
_COMPILED_FROM_BYTES_A_TENSOR = 1 << 20


class ServerStep:
    """`<S, A> -> <S, M>`, the aggregation's report and the update of the state.

    Args:
      parts: The round.
      sets: Where states are.
      device: Where the operations go; None to leave it to TensorFlow.
      compiled: Whether XLA compiles the step; None where the state is large, in
        few tensors, and XLA can.
    """

    def __init__(
        self, parts: RoundParts, sets: VariableSets, device: str | None, compiled: bool | None
    ):
        self._sets = sets
        self._device = device
        self._must = compiled is True
        self.compiled = _is_large(sets) if compiled is None else compiled
        report = ImportedComputation(parts.report, device)
        update = ImportedComputation(parts.update, device)
        self._inner_variables = (report.make_variables(), update.make_variables())
        num_state = len(sets.leaves)

        def step(
            old: list[tf.Variable], new: list[tf.Variable], total: list[Any], inner: Any
        ) -> list[Any]:
            result = report(total, inner[0])
            output = update([*[v.read_value() for v in old], *result], inner[1])
            for variable, value in zip(new, output[:num_state], strict=True):
                variable.assign(value)
            return output[num_state:]

        self._plain = tracing.function(step, autograph=False)
        self._xla = tracing.function(step, autograph=False, jit_compile=True)

    def __call__(self, held: OnDevice, total: list[Any]) -> tuple[OnDevice, list[Any]]:
        """Takes a step; the old state stays what it was."""
        new = self._sets.take()
        metrics = self._run(held.variables, new, total)
        _check_devices(self._sets.leaves, new, self._device)
        return OnDevice(self._sets, new), metrics

    def _run(self, old: list[Any], new: list[Any], total: list[Any]) -> list[Any]:
        arguments = (old, new, total, self._inner_variables)
        with device_scope(self._device):
            if self.compiled:
                try:
                    return self._xla(*arguments)
                except tf.errors.OpError as error:
                    if self._must:
                        raise
                    self.compiled = False
                    logging.getLogger(__name__).info("XLA cannot compile this step: %s", error)
            return self._plain(*arguments)


def _is_large(sets: VariableSets) -> bool:
    least = max(_COMPILED_FROM_BYTES, _COMPILED_FROM_BYTES_A_TENSOR * len(sets.leaves))
    return leaves.num_bytes(sets.type) >= least


def _check_devices(
    names: list[leaves.Leaf], variables: list[tf.Variable], device: str | None
) -> None:
    """Raises unless every tensor is in the memory of the device."""
    for leaf, variable in zip(names, variables, strict=True):
        # TensorFlow keeps integers and texts of a GPU's steps in the host's memory.
        if device is None or not leaf.dtype.is_floating:
            continue
        place = variable.device
        if not place.endswith(f"/device:{device[1:]}"):
            raise RuntimeError(
                f"The server state must be on {device}, but {leaf.name} is on {place}. The "
                "optimizer places its tensors itself: remove its own device setting."
            )
