"""A federated round written by hand, with adaptive aggregation inside it.

Nothing from `tff.learning` here: a whole `tff.templates.IterativeProcess` with its own
`run_one_round`, for a linear model in a few lines of TensorFlow. The clients' models are averaged
with weights that fall with their KL divergence from the server's model, in two ways that agree:

* on the clients: each client turns its divergence into a number, and `tff.federated_mean` does the
  rest, as it would under a secure sum;
* in the stream: `aggregators.federated_rule` stands where `tff.federated_mean` stood, with a rule
  that could weigh layer by layer, too. Its measurements come for free.

Divergences shrink as training goes on, so they are divided by their running mean, which both ways
carry in their state beside the model.

    python examples/custom_round.py
"""

import collections
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import rules, scores, weighting
from tff_optim.interrupts import let_workers_end

BATCH = collections.OrderedDict(x=tf.TensorSpec([None, 3]), y=tf.TensorSpec([None, 1]))
MODEL_TYPE = tff.to_type(
    collections.OrderedDict(kernel=(np.float32, [3, 1]), bias=(np.float32, [1]))
)
DATA_TYPE = tff.types.SequenceType(tff.types.tensorflow_to_type(BATCH))

TEMPERATURE = 0.5
RULE = rules.adaptive_mean(
    scores.kl_divergence, weighting.softmax(TEMPERATURE, memory=0.5), layers="model"
)


@tff.tensorflow.computation
def initial_state() -> Any:
    """A model of zeros, and the state the rule starts from: no score is known yet."""
    model = collections.OrderedDict(kernel=tf.zeros([3, 1]), bias=tf.zeros([1]))
    return collections.OrderedDict(model=model, rule=aggregators.rule_state(RULE, MODEL_TYPE)())


STATE_TYPE = initial_state.type_signature.result


@tff.tensorflow.computation(MODEL_TYPE, STATE_TYPE.rule)
def make_state(model: Any, rule: Any) -> Any:
    """The state of the next round."""
    return collections.OrderedDict(model=model, rule=rule)


@tff.tensorflow.computation(MODEL_TYPE, DATA_TYPE)
def train_locally(model: Any, data: Any) -> Any:
    """One epoch of SGD: returns the trained model and the number of examples."""

    def step(state: Any, batch: Any) -> Any:
        model, examples = state
        with tf.GradientTape() as tape:
            tape.watch(model)
            error = batch["x"] @ model["kernel"] + model["bias"] - batch["y"]
            loss = tf.reduce_mean(error**2)
        gradients = tape.gradient(loss, model)
        model = tf.nest.map_structure(lambda w, g: w - 0.05 * g, model, gradients)
        return model, examples + tf.cast(tf.shape(batch["x"])[0], tf.float32)

    return data.reduce((model, tf.constant(0.0)), step)


@tff.tensorflow.computation(MODEL_TYPE, STATE_TYPE, np.float32)
def kl_weight(trained: Any, state: Any, examples: Any) -> Any:
    """A client's weight, examples * exp(-KL / scale / TEMPERATURE), and its KL."""
    divergence = scores.kl_divergence(tf.nest.flatten(state["model"]), tf.nest.flatten(trained))
    relative = tf.math.divide_no_nan(divergence, state["rule"]["typical_score"][0])
    return examples * tf.exp(-relative / TEMPERATURE), divergence


@tff.tensorflow.computation(STATE_TYPE.rule, np.float32)
def remember(rule: Any, mean_divergence: Any) -> Any:
    """The running mean, half of it the newest round; all of it in the first."""
    old = rule["typical_score"]
    moved = tf.where(old > 0, 0.5 * old + 0.5 * mean_divergence, mean_divergence)
    return collections.OrderedDict(rule, typical_score=moved)


def build_process(weigh_on_clients: bool) -> tff.templates.IterativeProcess:
    """Builds the process: its state is the server's model and the rule's state."""

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(initial_state, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(STATE_TYPE, tff.SERVER), tff.FederatedType(DATA_TYPE, tff.CLIENTS)
    )
    def run_one_round(state: Any, data: Any) -> Any:
        at_clients = tff.federated_broadcast(state)
        trained, examples = tff.federated_map(train_locally, (at_clients["model"], data))
        if weigh_on_clients:
            weight, divergence = tff.federated_map(kl_weight, (trained, at_clients, examples))
            mean = tff.federated_mean(trained, weight)
            seen = (state["rule"], tff.federated_mean(divergence))
            rule_state = tff.federated_map(remember, seen)
            measured = collections.OrderedDict(weight=tff.federated_sum(weight))
        else:
            mean, rule_state, measured = aggregators.federated_rule(
                RULE, trained, state["rule"], server_model=state["model"], weight=examples
            )
        return tff.federated_map(make_state, (mean, rule_state)), measured

    return tff.templates.IterativeProcess(initialize, run_one_round)


def make_clients(count: int = 6, seed: int = 0) -> list[tf.data.Dataset]:
    """Clients of one linear truth, the last of which has it upside down."""
    rng = np.random.default_rng(seed)
    truth = np.array([[1.0], [-2.0], [0.5]])
    clients = []
    for k in range(count):
        x = rng.normal(size=(int(rng.integers(8, 40)), 3))
        y = x @ (truth if k < count - 1 else -truth) + 0.3
        columns = collections.OrderedDict(x=np.float32(x), y=np.float32(y))
        clients.append(tf.data.Dataset.from_tensor_slices(columns).batch(8))
    return clients


def main() -> None:
    """Trains both ways side by side and compares them."""
    let_workers_end()  # also in the background of a script
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        clients = make_clients()
        on_clients, in_stream = build_process(True), build_process(False)
        one, other = on_clients.initialize(), in_stream.initialize()
        print("round  mean KL   effective clients  largest difference between the two ways")
        for number in range(1, 6):
            one, _ = on_clients.next(one, clients)
            other, measured = in_stream.next(other, clients)
            difference = max(
                float(np.abs(a - b).max())
                for a, b in zip(
                    tf.nest.flatten(one["model"]), tf.nest.flatten(other["model"]), strict=True
                )
            )
            print(
                f"{number:5d}  {measured['score_mean']:.2e}  "
                f"{measured['effective_clients']:17.2f}  {difference:.1e}"
            )
            if difference > 1e-4:
                raise SystemExit("The two ways of weighting disagree.")
        print(
            "kernel:",
            np.round(np.ravel(other["model"]["kernel"]), 2),
            "bias:",
            np.round(other["model"]["bias"], 2),
        )
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
