"""One run: TFF's training loop with files, a progress bar and stops around it."""

import collections
import contextlib
import sys
import warnings
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.core.types import ClientId, Cohort, Function, Json, Process, Record, State, Value
from tff_optim.interrupts import Interrupt
from tff_optim.resident import client_data
from tff_optim.simulation import calls, hparams, metrics, same_run, stores, workers
from tff_optim.simulation.arguments import Plan, check_managers
from tff_optim.simulation.cohorts import Cohorts
from tff_optim.simulation.evaluation import COLUMN as _EVALUATION
from tff_optim.simulation.evaluation import Evaluation
from tff_optim.simulation.folder import Folder
from tff_optim.simulation.history import History, Table
from tff_optim.simulation.progress import ProgressBar
from tff_optim.simulation.threads import on_a_loop, wait

_TIME = tff.simulation.TRAINING_TIME_KEY
_DRAWN = "drawn_clients"  # a column if rounds may differ in their number of clients
_IS_DRAWN = "drawn"  # a column if clients may be evaluated without taking part
_TAKEN = ("round", "process", "seed", _TIME, _EVALUATION, hparams.COLUMN, _DRAWN)
_STUCK = 3  # rounds without a change before a warning


class _StopTraining(Exception):  # noqa: N818
    """Leaves TFF's loop between two rounds."""


def train(
    process: Process,
    cohorts: Cohorts,
    plan: Plan,
    folder: str | None,
    interrupt: Interrupt,
    name: str,
    seed: int,
) -> History:
    """Runs one process with one seed; see `run`."""

    def on_this_loop() -> History:
        with contextlib.closing(Folder(folder, plan.keep_best)) as where:
            return _Run(process, cohorts, plan, where, interrupt, name, seed).history()

    return on_a_loop(on_this_loop)


class _Run:
    """The functions that TFF's loop calls: process, draws, evaluation and release of metrics."""

    def __init__(
        self,
        process: Process,
        cohorts: Cohorts,
        plan: Plan,
        folder: Folder,
        interrupt: Interrupt,
        name: str,
        seed: int,
    ):
        self._process, self._cohorts, self._plan, self._folder = process, cohorts, plan, folder
        self._interrupt, self._run, self._initial = interrupt, (name, seed), None
        self._evaluation = Evaluation(plan, cohorts, name, seed)
        with plan.lock:
            given = plan.managers
            managers = given(name, seed) if callable(given) else given
            check_managers(managers)
            self._managers = list(managers)
        if folder.path is not None:
            self._find(seed)
        self._store: Value = None  # the store of clients' states
        self._state: State = None  # the state after round `_done`, the last one of this call
        self._done = folder.saved or 0
        self._in_round = False
        self._told = False  # whether it has warned that the model does not change
        self._cohort: list[ClientId] = []
        self._of_clients: list[Record] = []
        self._of_evaluation: dict[ClientId, Record] = {}  # by client
        self._bar: ProgressBar | None = None

    def _find(self, seed: int) -> None:
        """Finds the files of the same run in the folder."""
        plan, cohorts, folder = self._plan, self._cohorts, self._folder
        assert folder.path is not None
        with plan.lock:
            data = cohorts.fingerprints() if plan.compare_data else None
        run = same_run.describe(
            self._process,
            self.initialize(),
            given=plan.starts.weights[seed],
            seed=seed,
            clients_per_round=_written(plan.clients_per_round),
            draw=same_run.of_function(plan.draw),
            hparams=same_run.of_function(plan.hparams),
            keep_best=plan.keep_best and str(plan.keep_best),
            ids=same_run.of_ids(cohorts.ids),
            data=data,
            **self._evaluation.described(),
        )
        ids = list(dict.fromkeys([*cohorts.ids, *self._evaluation.ids]))
        folder.find(run, self._process, self.initialize(), ids, resume=plan.resume)
        saved = folder.saved or 0
        if saved > plan.rounds:
            raise ValueError(
                f"`rounds` must be at least {saved}, those that {folder.path} holds; found "
                f"{plan.rounds}. Give {saved} for these, or name another directory."
            )
        if saved:
            self._check_rounds(folder.last_change)

    def _check_rounds(self, last_change: int) -> None:
        """Raises `ValueError` if rounds since the last change had other clients or hyperparameters."""
        drawn: dict[int, list[ClientId]] = {}
        for row in self._folder.clients:
            if row.get(_IS_DRAWN, True):
                drawn.setdefault(row["round"], []).append(row["client"])
        prefix = hparams.COLUMN
        for record in self._folder.rounds:
            number = record["round"]
            if number <= last_change:
                continue
            with self._plan.lock:
                now = self._cohorts.draw(number)
            before = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
            drawn_by = "draw" if self._plan.draw else "clients_per_round"
            self._check_same(drawn_by, number, now, drawn.get(number, []))
            self._check_same("hparams", number, self._numbers(number), before)

    def _check_same(self, name: str, number: int, now: Value, before: Value) -> None:
        """Raises `ValueError`, or takes a note, if a function's result for a round has changed."""
        if now == before:
            return
        if self._plan.resume != "changed":
            raise ValueError(
                f"`{name}` must give what it gave in {self._folder.path}, {shown(before)} for round "
                f"{number}; found {shown(now)}. A function must depend on what it is given alone. "
                "Name another directory, or go on all the same with `resume='changed'`."
            )
        if name not in self._folder.changed:
            self._folder.changed.append(name)

    def _numbers(self, number: int) -> Record:
        """The hyperparameters to set before a round, by name."""
        if self._plan.hparams is None:
            return {}
        process, seed = self._run
        with self._plan.lock:
            given = calls.call(self._plan.hparams, number, process=process, seed=seed)
        return hparams.named(given)

    def history(self) -> History:
        """Trains, saves the last state, and returns the history."""
        keeps = self._cohorts.keeps_states
        with self._open_store() if keeps else contextlib.nullcontext() as self._store:
            self._folder.begin()
            return self._train()

    def _open_store(self) -> contextlib.AbstractContextManager[Value]:
        factory, folder = self._plan.client_states, self._folder
        if factory is None:
            raise ValueError(
                "`client_states` must be given for a process whose clients keep a state; found None. "
                "Pass `client_states=aggregators.ClientStates`."
            )
        between = self._plan.rounds_per_checkpoint
        # Two checkpoints are kept, and the older one counts if the newer one is damaged.
        keep = 1 if folder.path is None else between + max(between, folder.reach)
        # Rounds without clients count neither for the store nor in the server's state.
        empty = sum(record.get(_DRAWN, 1) == 0 for record in folder.rounds)
        done = (folder.saved or 0) - empty
        return stores.opened(factory, self._cohorts.ids, folder.path, keep, done)

    def _train(self) -> History:
        plan, run = self._plan, self._run
        ended, rounds = "finished", plan.rounds
        saved = self._folder.saved or 0
        self._so_far = self._table(self._folder.rounds)
        if saved and self._is_enough():
            ended, rounds = "stopped", saved
        self._bar = ProgressBar(f"{run[0]}, seed {run[1]}", rounds, saved, plan.progress)
        try:
            self._state = tff.simulation.run_training_process(
                self,
                self._draw,
                rounds,
                evaluation_fn=self._evaluate if self._evaluation else None,
                evaluation_selection_fn=lambda number: number,
                rounds_per_evaluation=plan.rounds_per_evaluation,
                program_state_manager=self._folder,
                rounds_per_saving_program_state=plan.rounds_per_checkpoint,
                metrics_managers=[_Release(self._release)],
            )
        except _StopTraining as reason:
            ended = str(reason)
        except Exception as error:
            if not (self._interrupt.pressed and self._in_round and self._state is not None):
                self._rescue(error)
                raise
            ended = "interrupted"
            print(f"The round that Ctrl-C met is lost: {shown(error)}", file=sys.stderr)
        finally:
            self._bar.close()
        wait(self._folder.save(self._state, self._done))
        best = self._folder.best
        kept = None if best is None else best.kept(self._state)
        return History(
            rounds=self._table(self._folder.rounds),
            clients=self._table(self._folder.clients),
            states={run: self._state},
            ended={run: ended},
            kept={} if kept is None else {run: kept},
        )

    def _rescue(self, error: Exception) -> None:
        """Saves the last good round before an error is raised."""
        if self._state is None:
            return
        try:
            wait(self._folder.save(self._state, self._done))
        except Exception as another:  # the first error is the reason
            error.add_note(f"Round {self._done} could not be saved: {shown(another)}")

    def initialize(self) -> State:
        """The initial state, made once."""
        if self._initial is None:
            self._initial = self._plan.starts.begin(self._process, *self._run)
            workers.watch()
        return self._initial

    def next(self, state: State, data: Cohort) -> tuple[State, Record]:
        """A round, with flat metrics; clients' states are committed when it ends."""
        if self._state is None and self._folder.saved is not None:
            self._check_evaluate(state)
        number = self._done + 1
        numbers = self._numbers(number)
        state = hparams.with_numbers(self._process, state, numbers)
        ids = [str(client) for client in self._cohort]
        plain = contextlib.nullcontext(data)
        with plain if self._store is None or not ids else self._store.cohort(ids, data) as cohort:
            self._in_round = True
            try:
                # Without clients the server's optimizer must not take a step.
                state, found = _pair(self._process.next(state, cohort)) if ids else (state, {})
            except Exception as error:
                client_data.explain(error, zip(self._cohort, data, strict=True))
                raise
            self._in_round = False
        workers.watch()  # TFF replaces lost workers
        self._of_clients = metrics.client_records(found, self._cohort)
        self._next_state, self._initial = state, None
        flat = metrics.flatten(found)
        metrics.check_names(flat, "process", _TAKEN)
        flat |= {hparams.COLUMN + name: value for name, value in numbers.items()}
        if self._cohorts.varies:
            flat[_DRAWN] = len(ids)
        return state, collections.OrderedDict(flat)

    def _draw(self, number: int) -> list[ClientId]:
        if self._state is not None:
            if self._interrupt.requested:
                raise _StopTraining("interrupted")
            if self._is_enough():
                raise _StopTraining("stopped")
        with self._plan.lock:
            self._cohort = self._cohorts.draw(number)
            return self._cohorts.data(self._cohort, number)

    def _is_enough(self) -> bool:
        with self._plan.lock:
            if self._plan.stop is None:
                return False
            found = self._plan.stop(self._so_far)
        if not isinstance(found, bool | np.bool_):
            raise TypeError(f"`stop` must return True or False; found {shown(found)}.")
        return bool(found)

    def _check_evaluate(self, state: State) -> None:
        """Raises `ValueError` if the evaluation of the same weights has changed since the run."""
        found = {
            name.removeprefix(_EVALUATION): value
            for record in self._folder.rounds
            for name, value in record.items()
            if record["round"] == self._done and name.startswith(_EVALUATION)
        }
        found.pop(tff.simulation.EVALUATION_TIME_KEY, None)
        if not self._evaluation or not found or self._plan.resume == "changed":
            return
        rows = (row for row in self._folder.clients if row["round"] == self._done)
        drawn = [row["client"] for row in rows if row.get(_IS_DRAWN, True)]
        now, _ = self._evaluated(state, self._done, drawn)
        if metrics.alike(now, found):
            return
        again, _ = self._evaluated(state, self._done, drawn)
        if metrics.alike(now, again):
            names = [name for name in {**now, **found} if now.get(name) != found.get(name)][:3]
            mine, theirs = ({name: one.get(name) for name in names} for one in (now, found))
            raise ValueError(
                f"`evaluate` must give what it gave in {self._folder.path}, {theirs} for the model of "
                f"round {self._done}; found {mine}. Evaluate on the same data, name another "
                "directory, or go on all the same with `resume='changed'`."
            )

    def _evaluate(self, state: State, number: int) -> Record:
        found, self._of_evaluation = self._evaluated(state, number, self._cohort)
        return found

    def _evaluated(
        self, state: State, number: int, cohort: Sequence[ClientId]
    ) -> tuple[Value, Value]:
        read = getattr(self._process, "get_model_weights", lambda state: state)
        return self._evaluation(read(state), number, cohort)

    async def _release(self, value: Mapping[str, Json], number: int) -> None:
        record = {k: v for k, v in value.items() if k != tff.simulation.ROUND_NUMBER_KEY}
        self._folder.add(number, record, self._rows(number))
        self._so_far.append(self._named(self._folder.rounds[-1]))
        if number:
            self._state, self._done = self._next_state, number
            self._warn_if_stuck()
        if self._folder.best is not None:
            state = self._state if number else self.initialize()
            self._folder.best.see(number, record, state)
        with self._plan.lock:
            for manager in self._managers:
                await manager.release(record, number)
        assert self._bar is not None
        await self._bar.release(record, number)

    def _rows(self, number: int) -> list[Record]:
        """A row for each client that took part or was evaluated."""
        rows, evaluated = self._of_clients if number else [], self._of_evaluation
        self._of_evaluation = {}
        if self._plan.per_client is None or self._plan.per_client.clients is None:
            return [{**row, **evaluated.get(row["client"], {})} for row in rows]
        drawn = [{**row, _IS_DRAWN: True, **evaluated.pop(row["client"], {})} for row in rows]
        others = evaluated.items()
        return drawn + [{"client": one, _IS_DRAWN: False, **found} for one, found in others]

    def _warn_if_stuck(self) -> None:
        """Warns once if several rounds in a row left the model unchanged."""
        last = self._folder.rounds[-_STUCK:]
        reasons = [metrics.why_unchanged(record) for record in last]
        if self._told or len(last) < _STUCK or not all(reasons):
            return
        self._told = True
        warnings.warn(
            f"The model of {self._run[0]!r}, seed {self._run[1]}, has not changed in {_STUCK} rounds in "
            f"a row, up to round {self._done}: no client has counted, or their update was not finite "
            f"({reasons[-1]}). Look for data, losses or scores that are not finite, or for a learning "
            "rate that is too large.",
            stacklevel=2,
        )

    def _table(self, records: list[Record]) -> Table:
        return Table([self._named(record) for record in records])

    def _named(self, record: Mapping[str, Json]) -> Record:
        process, seed = self._run
        return {"process": process, "seed": seed, **record}


@attrs.frozen
class _Release(tff.program.ReleaseManager):
    """A release manager made of a function."""

    function: Function

    async def release(self, value: Value, key: int) -> None:
        await self.function(value, key)


def _pair(output: Value) -> tuple[Value, Value]:
    """State and metrics of a `LearningProcessOutput`, or of an `IterativeProcess`' result."""
    if hasattr(output, "metrics"):
        return output.state, output.metrics
    state, found = output
    return state, found if isinstance(found, Mapping) else {"result": found}


def _written(size: Value) -> Value:
    """A number as it is; a function in short."""
    return same_run.of_function(size) if callable(size) else size
