"""Trains processes on clients, and records the metrics of each round."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_federated as tff

from tff_optim.core.checks import check_whole, whole
from tff_optim.core.messages import shown
from tff_optim.core.types import Function, Json, Number, Process, Value, Weights
from tff_optim.interrupts import end_worker_at_exit, let_rounds_end
from tff_optim.simulation import arguments, cohorts, starts
from tff_optim.simulation.history import History, Table, join
from tff_optim.simulation.per_client import PerClient
from tff_optim.simulation.threads import side_by_side
from tff_optim.simulation.training import train


def run(
    process: Process | Function | Mapping[str, Process | Function],
    clients: Value,
    *,
    rounds: int,
    clients_per_round: int | Callable[[int], int] | None = None,
    draw: cohorts.Draw | None = None,
    hparams: Callable[..., Mapping[str, Number]] | None = None,
    seed: int | Sequence[int] = 0,
    evaluate: Callable[..., Mapping[str, Json]] | None = None,
    per_client: PerClient | None = None,
    rounds_per_evaluation: int = 1,
    directory: str | os.PathLike[str] | None = None,
    rounds_per_checkpoint: int = 10,
    resume: bool | str = True,
    compare_data: bool = True,
    progress: bool = True,
    stop: Callable[[Table], bool] | None = None,
    keep_best: str | None = None,
    managers: Sequence[tff.program.ReleaseManager] | Function = (),
    client_states: Function | None = None,
    initial_weights: Weights = None,
    runs_at_once: int | None = None,
) -> History:
    """Trains one or several processes with one or several seeds, some of them side by side.

    Each run is a call of `tff.simulation.run_training_process`. With a `directory`, it writes
    `records.jsonl`, `rounds.csv` and `clients.csv`, which are made from it (see `History`),
    `tensorboard/` with a curve for every number, and `checkpoints/`. Only one run at a time can use a
    directory. Damaged files in it are skipped with a warning, or refused. After a kill, the same call
    resumes the run with the numbers of an undisturbed one, since the clients of a round depend on the
    seed and the round's number only. (Shuffled data need a seed, and `reshuffle_each_iteration=False` in
    the Python process.)

    The first Ctrl-C lets the round end, saves it and returns the history; the second raises
    `KeyboardInterrupt` at once. (A round is lost if Ctrl-C at the terminal ended its worker; a new
    worker starts by itself.) TFF's own worker ends with the program.

    Example:
      >>> import tensorflow as tf
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> process = tff.learning.algorithms.build_weighted_fed_avg(
      ...     model, tff.learning.optimizers.build_sgdm(0.1)
      ... )
      >>> data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
      >>> clients = {"ann": data, "bob": data, "eve": data}
      >>> history = run(process, clients, rounds=3, clients_per_round=2)
      >>> history.rounds["round"].tolist(), len(history.clients)
      ([1, 2, 3], 6)
      >>> history.rounds["finalizer/update_non_finite"].tolist()
      [0, 0, 0]

    Args:
      process: A `tff.learning.templates.LearningProcess` or `ResidentProcess`, or a mapping from names
        to such processes. Instead of a process you can give a function from a seed to one, so that
        models start differently too; the process is closed after its run if it has a `close`.
      clients: A mapping from ids to data, a list of data (ids are positions), a
        `tff.simulation.datasets.ClientData`, or `ClientArrays`. Data are a `tf.data.Dataset` of
        batches, or a list of batches. Or a function that returns one of these; it is called once with
        each seed, before training, so that clients may differ too.
      rounds: Rounds of training, including those before a resume; at least as many as `directory` has.
      clients_per_round: The number of clients drawn for each round, uniformly and without replacement,
        or a function from a round to this number.
      draw: A function that draws the clients instead. It gets the round, the ids of all clients, and a
        `numpy.random.Generator` that depends on seed and round only. It returns a list of ids; an empty
        one makes a round that leaves the model alone. See `poisson`.
      hparams: A function that is called before each round with its number. It returns the numbers for
        `process.set_hparams` by name, such as `{"finalizer/learning_rate": 0.1}`; all others stay as
        they are. Nothing is traced again. Rounds show these numbers as `hparams/NAME`.
      seed: The seed of the draws, or several seeds.
      evaluate: A function that is called with the model weights and returns numbers by name; for several
        data sets, a mapping of such mappings. Use it as a hook for the model after a round, too.
      per_client: A `PerClient`, which evaluates the model on single clients: those of the round, or a
        held-out federation.
      rounds_per_evaluation: How often to evaluate; the first time is before the first round.
      directory: A directory for files. Each of several runs has a folder of its own, `NAME/seed_N`.
      rounds_per_checkpoint: How often to save the state; the last time is at the end. For a small model
        a checkpoint of plain TFF takes longer than a round.
      resume: Whether to resume the run in `directory`. True accepts only the same run: the same process
        (computations, constants, hyperparameters), initial weights if given, clients, data, draws and
        evaluation; package versions may differ, with a warning. "changed" accepts another run if its
        state fits, and records in `arguments.json` what changed after which round.
      compare_data: Whether "the same run" includes the clients' data, of at most 100 clients spread over
        the ids: their specification, number of elements and first element. This takes a few milliseconds
        per client.
      progress: Whether to show a progress bar on a terminal or in a notebook. If stderr is a log file,
        it gets at most a line every ten seconds.
      stop: A function that is called after each round with the rounds so far; a true result ends the
        run. See `no_better` and `reached`.
      keep_best: A metric, such as "evaluation/accuracy", whose best round is kept besides the last two:
        its state is in `History.kept`, and in `best/`. If the name does not contain "accuracy" or
        "loss", write "max NAME" or "min NAME" to say which values are better.
      managers: Further `tff.program.ReleaseManager`s that get the flat metrics of each round; or a
        function, called with each run's name and seed, that returns them. After a kill, rounds
        since the last saved state are released again.
      client_states: `aggregators.ClientStates`, for processes whose clients keep a state
        (`build_scaffold`): each run has a store of its own, in its folder or in memory. The store can go
        back to both checkpoints, so a resumed run finds the states of its round.
      initial_weights: The weights that all runs start from: `tff.learning.models.ModelWeights`, a Keras
        model with these weights, or a function that is called once with each seed and returns one of
        these. None leaves it to the processes. Each then draws its initial weights when it is built: the
        same for all seeds, but different ones for each process, unless the layers' initializers have a
        seed. A warning says so.
      runs_at_once: How many runs go on side by side, each in a thread, with the same numbers as one
        after the other; None for one run per two cores. Your own functions (which build or evaluate),
        data, `stop` and managers serve one run at a time. So does a `ResidentProcess`: give a function
        of the seed that makes one.

    `evaluate` and `hparams` may also have parameters named `process` (its name) and `seed`, without
    defaults, and `evaluate` one named `round`, for which they get these values. One process can so be
    trained under several names at several rates, for example.

    Returns:
      A `History`. States of a `ResidentProcess` that a function made are plain, since it is closed.

    Raises:
      TypeError: If an argument is of the wrong type, or the process does not take a client's data; the
        message names the client.
      ValueError: If a number is out of range, or `directory` has another run, more rounds, or damage. An
        error of a round is raised after the rounds before it are saved.
      RuntimeError: If another run uses `directory`.
    """
    processes, seeds, path = (
        arguments.as_processes(process),
        arguments.as_seeds(seed),
        arguments.as_path(directory),
    )
    by_seed = {number: clients(number) if callable(clients) else clients for number in seeds}
    plan = arguments.Plan(
        rounds=rounds,
        draw=draw,
        clients_per_round=clients_per_round,
        hparams=hparams,
        evaluate=evaluate,
        per_client=per_client,
        rounds_per_evaluation=rounds_per_evaluation,
        rounds_per_checkpoint=rounds_per_checkpoint,
        resume=resume,
        compare_data=compare_data,
        progress=progress,
        stop=stop,
        keep_best=keep_best,
        managers=managers,
        client_states=client_states,
        starts=starts.Starts(
            {number: starts.initial_weights(initial_weights, number) for number in seeds},
            compared=len(processes) > 1,
        ),
    )
    for some in by_seed.values():
        ids, _ = cohorts.clients_by_id(some)
        if isinstance(plan.clients_per_round, int):
            cohorts.check_size(plan.clients_per_round, len(ids))
    arguments.check_states_are_kept(client_states, processes)
    end_worker_at_exit()
    half = max(len(os.sched_getaffinity(0)) // 2, 1)
    at_once: int = half if runs_at_once is None else whole(runs_at_once)
    check_whole("runs_at_once", at_once, 1)
    several = isinstance(process, Mapping) or not isinstance(whole(seed), int)

    def train_one(name: str, number: int) -> list[History]:
        if interrupt.requested:
            return []
        folder = path
        if folder is not None and several:
            folder = os.path.join(folder, name, f"seed_{number}")
        with _built(processes[name], number, name, plan) as one:
            drawn = cohorts.Cohorts(
                by_seed[number], plan.clients_per_round, draw, number, arguments.data_type(one)
            )
            history = train(one, drawn, plan, folder, interrupt, name, number)
            is_closed = one is not processes[name] and hasattr(one, "materialize")
            return [history.materialized(one) if is_closed else history]

    lanes = arguments.lanes(processes, seeds)
    with let_rounds_end() as interrupt:
        if at_once == 1 or len(lanes) == 1:
            histories = [one for run in itertools.chain(*lanes) for one in train_one(*run)]
        else:
            calls = [
                lambda lane=lane: [h for run in lane for h in train_one(*run)] for lane in lanes
            ]
            histories = list(itertools.chain(*side_by_side(calls, at_once, interrupt)))
    return join(histories)


@contextlib.contextmanager
def _built(made: Value, seed: int, name: str, plan: arguments.Plan) -> Iterator[Process]:
    """The given process, or one that is made for this seed and closed at the end."""
    if hasattr(made, "next"):
        yield made
        return
    with plan.lock:
        one = made(seed)
    if not hasattr(one, "next") or not hasattr(one, "initialize"):
        raise TypeError(
            "`process` must be a function that returns a learning process; found that "
            f"{name!r} returned {shown(one)}."
        )
    try:
        yield one
    finally:
        if hasattr(one, "close"):
            one.close()
