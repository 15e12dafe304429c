"""Checkpoints that a process writes where its state is, as a TFF program state manager."""

import asyncio
import hashlib
import json
import os
import warnings

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.checks import check_whole
from tff_optim.core.types import Record, State, Structure
from tff_optim.resident import leaves, maker
from tff_optim.resident.errors import CheckpointError
from tff_optim.resident.process import ResidentProcess
from tff_optim.resident.state.references import references_to
from tff_optim.resident.versions import VersionDirectory, check_version

_STATE = "state"
_STATE_FILES = (f"{_STATE}.index", f"{_STATE}.data-00000-of-00001")
_MADE_BY = "made_by.json"
_STEP = "server_step"
_FORMAT = 2  # raised with each change of what `maker.fingerprint` counts


_INSTEAD = (
    "Build the process as it was; to take over the model alone, read the file with "
    "`tf.train.load_checkpoint` and use `set_model_weights`."
)


class _DamagedError(CheckpointError):
    """A version that is not whole, where an earlier one may be."""


class ResidentCheckpoints(tff.program.ProgramStateManager):
    """Saves the states of a `ResidentProcess`.

    Each version is a directory `version_N` with one checkpoint in TensorFlow's format,
    `version_N/state`, which `tf.train.load_checkpoint` reads under names such as
    `global_model_weights/trainable/0`. It is written under another name, read back, and renamed when it
    is whole, so a killed save leaves earlier versions as they are. (Saving does not wait for the disk: a
    power cut may lose the newest version.) `version_N/made_by.json` describes the step that the
    process's server takes, so that a state of another optimizer is refused even if all names and shapes
    are equal. Only their owner can read versions.

    One run saves to a directory. Of two, the one that saves first goes on; the other gets a
    `CheckpointError` before it has written anything.

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
      directory: The directory, created if missing.
      keep: How many of the newest versions are kept; None for all.
      accept_changes: Whether to load a state whose server took another kind of step, with a warning.

    Raises:
      TypeError: If `process` is not a `ResidentProcess`.
      ValueError: If `keep` is out of range, or `directory` is empty.
    """

    def __init__(
        self,
        process: ResidentProcess,
        directory: str | os.PathLike[str],
        keep: int | None = 5,
        *,
        accept_changes: bool = False,
    ):
        if not isinstance(process, ResidentProcess):
            raise TypeError(
                f"`process` must be a `ResidentProcess`; found {type(process).__name__}. For other "
                "processes there is `tff.program.FileProgramStateManager`."
            )
        check_whole("keep", keep, 1, optional=True)
        if not os.fspath(directory):
            raise ValueError("`directory` must be a path; found an empty string.")
        self._leaves = leaves.leaves_of(process.state_type)
        self._process, self._accept_changes = process, accept_changes
        self._directory = VersionDirectory(os.path.abspath(directory), keep)
        self._damaged: set[int] = set()
        self._made_by: Record | None = None

    def versions(self) -> list[int]:
        """Lists the versions, oldest first."""
        return self._directory.versions()

    def save_now(self, state: State, version: int) -> None:
        """Saves a state, and removes versions that are too old.

        Args:
          state: A state of the process, resident or plain.
          version: A whole number above all saved ones, such as the round's.

        Raises:
          TypeError: If `state` is not a state of the process, or `version` no whole number.
          ValueError: If `version` is not above the newest.
          tff.program.ProgramStateExistsError: If the version exists.
          CheckpointError: If another run saves to the directory, or the version could not be written,
            for example because the disk is full.
        """
        version = check_version(version)
        held = self._process._server.take_in(state)
        made_by = self._maker()
        try:
            with self._directory.new(version, self._damaged) as path:
                with open(os.path.join(path, _MADE_BY), "w", encoding="ascii") as f:
                    json.dump(made_by | {"checksum": _checksum(made_by)}, f)
                self._process._server.write(held, os.path.join(path, _STATE))
                self._read_back(path)
        except (OSError, tf.errors.OpError) as error:
            raise CheckpointError(
                f"Version {version} could not be written to {self._directory.path}: "
                f"{_reason(error)} The versions before it, {self.versions()}, are as they were, "
                "and the state can still be used: make room and save it again."
            ) from error
        self._damaged.clear()

    def load_now(self, version: int) -> State:
        """Loads a version to the device of the process.

        Returns:
          A state with references as leaves.

        Raises:
          tff.program.ProgramStateNotFoundError: If there is no such version.
          CheckpointError: If it is damaged, or belongs to another process.
        """
        version = check_version(version)
        self._process._server.check_open()
        path = self._directory.path_of(version)
        if not os.path.lexists(path):
            raise tff.program.ProgramStateNotFoundError(version)
        self._directory.look()
        what = f"Version {version} in {self._directory.path}"
        try:
            names = self._check(what, path)
            return references_to(self._process._server.read(os.path.join(path, _STATE), names))
        except (CheckpointError, OSError, tf.errors.OpError) as error:
            if not os.path.lexists(path):
                raise tff.program.ProgramStateNotFoundError(version) from error
            if isinstance(error, CheckpointError):
                raise
            raise _DamagedError(f"{what} cannot be read: {_reason(error)}") from error

    def resume(self, go_back: bool = True) -> tuple[State, int]:
        """Loads the newest whole version, or the initial state if nothing was saved.

        Args:
          go_back: Whether to skip damaged versions, with a warning that names them, and load the newest
            whole one before them. The next save renames the skipped ones to `damaged_version_N_...`.

        Returns:
          A state and its version; the initial state and 0 if nothing was saved.

        Raises:
          CheckpointError: If the newest version is damaged and `go_back` is False, no version is whole,
            or they belong to another process.
        """
        damaged: dict[int, str] = {}
        odd = [f"{name} is not numbered" for name in self._directory.odd_names()]
        self._directory.look()
        while ahead := [version for version in self.versions() if version not in damaged]:
            version = ahead[-1]
            try:
                state = self.load_now(version)
            except tff.program.ProgramStateNotFoundError:
                continue  # another run has removed it for a newer one
            except _DamagedError as error:
                if not go_back:
                    raise
                damaged[version] = str(error)
                continue
            self._left_out([*damaged.values(), *odd], f"resuming from version {version}")
            self._damaged = set(damaged)
            return state, version
        if damaged:
            raise CheckpointError(
                f"No version in {self._directory.path} is whole. {' '.join(damaged.values())} "
                "Restore one from a copy, or start anew in another directory."
            )
        self._left_out(odd, "starting anew")
        return self._process.initialize(), 0

    async def get_versions(self) -> list[int] | None:
        """Lists the versions, or returns None."""
        return self.versions() or None

    async def save(self, program_state: State, version: int) -> None:
        """`save_now` for TFF's loops."""
        await asyncio.to_thread(self.save_now, program_state, version)

    async def load(self, version: int, structure: Structure) -> State:
        """`load_now` for TFF's loops; the process knows the structure."""
        del structure
        return await asyncio.to_thread(self.load_now, version)

    async def load_latest(self, structure: Structure) -> tuple[State, int]:
        """`resume` for TFF's loops, which compute the initial state themselves."""
        del structure
        if not self.versions():
            return None, 0
        return await asyncio.to_thread(self.resume)

    async def remove_all(self) -> None:
        """Removes all versions."""
        self._directory.remove_all()
        self._damaged.clear()

    def _left_out(self, reasons: list[str], then: str) -> None:
        if reasons:
            warnings.warn(
                f"Left out in {self._directory.path}, {then}: {' '.join(reasons)}", stacklevel=3
            )

    def _maker(self) -> Record:
        if self._made_by is None:
            self._made_by = {
                "format": _FORMAT,
                **maker.versions(),
                _STEP: maker.fingerprint(self._process.process.next),
            }
        return self._made_by

    def _read_back(self, path: str) -> None:
        """Reads all files back before they count as a version."""
        try:
            reader = tf.train.load_checkpoint(os.path.join(path, _STATE))
            for name in reader.get_variable_to_shape_map():
                reader.get_tensor(name)  # this compares the checksum
        except leaves.READ_ERRORS as error:
            raise OSError(f"what was written cannot be read back: {_reason(error)}") from error
        for name in os.listdir(path):
            if name in (_MADE_BY, *_STATE_FILES):
                os.chmod(os.path.join(path, name), 0o600)
            else:
                os.remove(os.path.join(path, name))

    def _check(self, what: str, path: str) -> list[str]:
        """Raises unless a version is whole and a state of the process; returns its leaves' names."""
        if not os.path.isdir(path):
            raise _DamagedError(f"{what} is not a directory.")
        for name in (_MADE_BY, *_STATE_FILES):
            if not os.path.isfile(os.path.join(path, name)):
                raise _DamagedError(f"{what} lacks the file {name}.")
        try:
            with open(os.path.join(path, _MADE_BY), encoding="ascii") as f:
                made_by = json.load(f)
            if not isinstance(made_by, dict):
                raise ValueError("it is not an object")
            if made_by.pop("checksum", None) != _checksum(made_by):
                raise ValueError("its checksum does not match")
        except ValueError as error:  # of JSON and of encodings too
            raise _DamagedError(f"{what} cannot be read: {_MADE_BY}: {error}.") from error
        prefix = os.path.join(path, _STATE)
        try:
            reader = tf.train.load_checkpoint(prefix)
            shapes = reader.get_variable_to_shape_map()
            dtypes = reader.get_variable_to_dtype_map()
        except leaves.READ_ERRORS as error:
            raise _DamagedError(f"{what} cannot be read: {_reason(error)}") from error
        names = [n if n in shapes else leaves.earlier(n) for n in (x.name for x in self._leaves)]
        wanted = dict(zip(names, self._leaves, strict=True))
        found = set(shapes) - {leaves.MARK}
        wrong = sorted(
            name
            for name in set(wanted) & found
            if dtypes[name] != wanted[name].dtype
            or not wanted[name].shape.is_compatible_with(shapes[name])
        )
        if set(wanted) != found or wrong:
            raise CheckpointError(
                f"{what} was saved by another process: it lacks {sorted(set(wanted) - found)}, "
                f"has {sorted(found - set(wanted))} besides, and differs in shape or dtype at "
                f"{wrong}. {_INSTEAD}"
            )
        self._check_maker(what, made_by)
        return names

    def _check_maker(self, what: str, found: Record) -> None:
        wanted = self._maker()
        if found.get(_STEP) == wanted[_STEP]:
            return
        others = [
            f"{name} {found.get(name, 'of an unknown version')}"
            for name in wanted
            if name != _STEP and found.get(name) != wanted[name]
        ]
        if others:
            # The same optimizer may be made of other operations there.
            warnings.warn(
                f"{what} was saved with {' and '.join(others)}: whether it was by the same "
                "optimizer cannot be told.",
                stacklevel=4,
            )
            return
        differs = (
            f"{what} was saved by another process: names and shapes are equal, but its server "
            "computes a new state with other operations, so that the numbers mean something else "
            "(another server optimizer or aggregator)."
        )
        if self._accept_changes:
            warnings.warn(f"{differs} It is loaded, as `accept_changes` asks.", stacklevel=4)
            return
        raise CheckpointError(
            f"{differs} To load it all the same, give `accept_changes=True`. {_INSTEAD}"
        )


def _checksum(made_by: Record) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def _reason(error: BaseException) -> str:
    return str(error).rstrip(".") + "."
