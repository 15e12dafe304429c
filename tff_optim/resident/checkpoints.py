"""Checkpoints that the worker itself writes and reads, as a TFF program state manager."""

import asyncio
import os
import re
import shutil
import uuid
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.errors import CheckpointError
from tff_optim.resident.in_worker.host import is_cut
from tff_optim.resident.process import ResidentProcess

_FILE = "state"
_VERSION = re.compile(r"version_(\d+)$")
_UNFINISHED = "unfinished_"


class ResidentCheckpoints(tff.program.ProgramStateManager):
    """Saves the states of a `ResidentProcess` without a trip through Python.

    Each version is a directory `version_N` that holds one checkpoint in TensorFlow's format,
    `version_N/state`: `tf.train.load_checkpoint` reads it, under names such as
    `global_model_weights/trainable/0`. It is written under another name and renamed when it is
    complete, so that a save that is killed leaves the versions before it as they are. (It does
    not wait for the disk: a power cut may take the newest version.)

    A worker that does not share this machine's files sends the state through Python; the files
    are the same.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> model = tff.learning.models.functional_model_from_keras(
        ...     tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
        ...     tf.keras.losses.MeanSquaredError(),
        ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
        ... )
        >>> process = tff.learning.algorithms.build_weighted_fed_avg(
        ...     model, tff.learning.optimizers.build_sgdm(0.1)
        ... )
        >>> clients = [tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))] * 2
        >>> with ResidentProcess(process) as resident:
        ...     checkpoints = ResidentCheckpoints(resident, tempfile.mkdtemp())
        ...     state, last_round = checkpoints.resume()
        ...     for round_number in range(last_round + 1, 4):
        ...         state, metrics = resident.next(state, clients)
        ...         checkpoints.save_now(state, round_number)
        ...     _, last_round = checkpoints.resume()
        >>> last_round
        3

    or as the `program_state_manager` of `tff.simulation.run_training_process`, which resumes
    by itself.

    Args:
        process: The process whose states are saved.
        directory: Where; made if it is not there.
        keep: How many of the newest versions are kept; None for all.

    Raises:
        TypeError: `process` is not a `ResidentProcess`.
        ValueError: `keep` is not a positive integer or None, or `directory` is empty.
    """

    def __init__(
        self, process: ResidentProcess, directory: str | os.PathLike[str], keep: int | None = 5
    ):
        if not isinstance(process, ResidentProcess):
            raise TypeError(
                f"`process` must be a `ResidentProcess`, found {type(process).__name__}. For other "
                "processes there is `tff.program.FileProgramStateManager`."
            )
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise ValueError(f"`keep` must be a positive integer or None, found {keep!r}.")
        if not os.fspath(directory):
            raise ValueError("`directory` must be a path, found an empty string.")
        self._leaves = leaves.leaves_of(process.state_type)
        odd = [leaf.name for leaf in self._leaves if not leaf.is_tensor]
        if odd:
            raise ValueError(
                "`process` must have a state of tensors alone, which is what checkpoints hold; "
                f"found something else at {odd}."
            )
        self._process = process
        # The worker has a working directory of its own.
        self._directory = os.path.abspath(directory)
        self._keep = keep
        os.makedirs(self._directory, exist_ok=True)

    def versions(self) -> list[int]:
        """Lists the complete versions, the oldest first."""
        found = (_VERSION.match(entry) for entry in os.listdir(self._directory))
        return sorted(int(match.group(1)) for match in found if match)

    def save_now(self, state: Any, version: int) -> None:
        """Saves a state, and removes versions that are too old.

        Args:
            state: A state of the process, resident or plain.
            version: A number larger than those saved before, such as the round's.

        Raises:
            tff.program.ProgramStateExistsError: The version is there already.
            CheckpointError: It could not be written, for example because the disk is full.
        """
        target = self._path(version)
        if os.path.exists(target):
            raise tff.program.ProgramStateExistsError(version=version, path=self._directory)
        self._remove_unfinished()
        unfinished = os.path.join(self._directory, _UNFINISHED + uuid.uuid4().hex)
        try:
            os.makedirs(unfinished)
            self._write(state, os.path.join(unfinished, _FILE))
            os.rename(unfinished, target)
        except BaseException as e:
            shutil.rmtree(unfinished, ignore_errors=True)
            if _came_from_writing(e):
                raise CheckpointError(
                    f"Version {version} could not be written to {self._directory}: "
                    f"{_reason(e)} The versions before it, {self.versions()}, are as they were, "
                    "and the state is still in the worker: make room and save it again."
                ) from e
            raise
        if self._keep is not None:
            for old in self.versions()[: -self._keep]:
                self._remove(old)

    def load_now(self, version: int) -> Any:
        """Loads a version into the worker.

        Returns:
            A state with references as leaves.

        Raises:
            tff.program.ProgramStateNotFoundError: There is no such version.
            CheckpointError: It cannot be read, or belongs to another process.
        """
        path = self._path(version)
        if not os.path.exists(path):
            raise tff.program.ProgramStateNotFoundError(version)
        prefix = os.path.join(path, _FILE)
        self._check(prefix)
        return self._process._place.load(prefix).references()

    def resume(self) -> tuple[Any, int]:
        """Loads the newest version, or starts anew where there is none.

        Returns:
            A state and its version; the initial state and 0 where nothing was saved.
        """
        versions = self.versions()
        if not versions:
            return self._process.initialize(), 0
        return self.load_now(versions[-1]), versions[-1]

    async def get_versions(self) -> list[int] | None:
        """Lists the complete versions, or returns None."""
        return self.versions() or None

    async def save(self, program_state: Any, version: int) -> None:
        """Does what `save_now` does, for TFF's loops."""
        await asyncio.to_thread(self.save_now, program_state, version)

    async def load(self, version: int, structure: Any) -> Any:
        """Does what `load_now` does, for TFF's loops; the process knows the structure."""
        del structure
        return await asyncio.to_thread(self.load_now, version)

    async def remove_all(self) -> None:
        """Removes all versions."""
        for version in self.versions():
            self._remove(version)
        self._remove_unfinished()

    def _path(self, version: int) -> str:
        return os.path.join(self._directory, f"version_{int(version)}")

    def _remove(self, version: int) -> None:
        # Renamed first: a version that is removed in part would still look complete.
        doomed = os.path.join(self._directory, _UNFINISHED + uuid.uuid4().hex)
        os.rename(self._path(version), doomed)
        shutil.rmtree(doomed)

    def _remove_unfinished(self) -> None:
        for entry in os.listdir(self._directory):
            if entry.startswith(_UNFINISHED):
                shutil.rmtree(os.path.join(self._directory, entry), ignore_errors=True)

    def _write(self, state: Any, prefix: str) -> None:
        self._process._place.save(self._process._source(state), prefix)

    def _check(self, prefix: str) -> None:
        """Compares what a checkpoint holds with what the process needs."""
        try:
            reader = tf.train.load_checkpoint(prefix)
            shapes = reader.get_variable_to_shape_map()
            dtypes = reader.get_variable_to_dtype_map()
        except (tf.errors.OpError, ValueError, RuntimeError) as e:
            raise CheckpointError(f"{prefix} cannot be read as a checkpoint: {e}") from e
        wanted = {leaf.name: leaf for leaf in self._leaves}
        found = set(shapes) - {leaves.MARK}
        wrong = sorted(
            name
            for name in set(wanted) & found
            if dtypes[name] != wanted[name].dtype
            or not wanted[name].shape.is_compatible_with(shapes[name])
        )
        if set(wanted) != found or wrong:
            raise CheckpointError(
                f"{prefix} was saved by another process: it lacks {sorted(set(wanted) - found)}, "
                f"has {sorted(found - set(wanted))} besides, and differs in shape or dtype at "
                f"{wrong}."
            )


def _came_from_writing(error: BaseException) -> bool:
    """Whether the file system, here or in the worker, refused to take a checkpoint."""
    if isinstance(error, OSError | tf.errors.OpError):
        return True
    return hasattr(error, "details") and not is_cut(error)  # type: ignore[arg-type]


def _reason(error: BaseException) -> str:
    details = getattr(error, "details", None)
    text = str(details() if callable(details) else error)
    return text.rstrip(".") + "."
