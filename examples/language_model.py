"""A language model of the topics of Python's manual: each topic is a client, some are held out.

    python examples/language_model.py [ROUNDS]

The texts come with Python (`pydoc_data.topics`). Prints the perplexity on topics that nobody trained on,
and a sentence.
"""

import collections
import os
import re
import sys
from pydoc_data.topics import topics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import build_fed_avg
from tff_optim import ResidentProcess, build_keras_optimizer, simulation

WORDS, LENGTH = 500, 20
TEXTS = {name: re.findall(r"[a-z]+|[.,]", text.lower()) for name, text in topics.items()}
COUNTS = collections.Counter(word for words in TEXTS.values() for word in words)
VOCABULARY = ["<rare>", *(word for word, _ in COUNTS.most_common(WORDS - 1))]
NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


def build_keras_model() -> tf.keras.Model:
    """Words to the logits of the words that follow."""
    embedding = tf.keras.layers.Embedding(WORDS, 32, input_length=LENGTH)
    recurrent = tf.keras.layers.GRU(64, return_sequences=True)
    return tf.keras.Sequential([embedding, recurrent, tf.keras.layers.Dense(WORDS)])


def model_fn() -> tff.learning.models.VariableModel:
    """The same for TFF."""
    spec = tf.TensorSpec([None, LENGTH], tf.int32)
    return tff.learning.models.from_keras_model(
        build_keras_model(),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        input_spec=(spec, spec),
    )


def sentences(words: list[str]) -> np.ndarray:
    """Rows of numbers of `LENGTH + 1` words."""
    numbers = np.int32([NUMBERS.get(word, 0) for word in words])
    rows = (len(numbers) - 1) // LENGTH
    return np.stack([numbers[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(rows)])


def main(rounds: str = "100"):
    """Trains, prints perplexity and a sentence, and returns the history."""
    data = {name: sentences(words) for name, words in TEXTS.items() if len(words) > 8 * LENGTH}
    held_out = np.concatenate([data.pop(name) for name in sorted(data)[::8]])
    clients = {
        name: tf.data.Dataset.from_tensor_slices((rows[:, :-1], rows[:, 1:])).batch(8)
        for name, rows in data.items()
    }
    sgd = build_keras_optimizer(tf.keras.optimizers.SGD(1.0, clipnorm=1.0))
    adam = build_keras_optimizer(tf.keras.optimizers.Adam(0.01))
    process = build_fed_avg(model_fn, sgd, adam)
    model = build_keras_model()
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def evaluate(weights):
        weights.assign_weights_to(model)
        return {"perplexity": np.exp(loss(held_out[:, 1:], model(held_out[:, :-1])))}

    with ResidentProcess(process, device="CPU:0") as resident:
        history = simulation.run(
            resident,
            clients,
            rounds=int(rounds),
            clients_per_round=8,
            evaluate=evaluate,
            rounds_per_evaluation=10,
        )
        evaluate(resident.get_model_weights(history.state))
    for record in history.rounds:
        if "evaluation/perplexity" in record:
            print(f"round {record['round']}: perplexity {record['evaluation/perplexity']:.1f}")
    rng, words = np.random.default_rng(0), sentences(TEXTS["for"])[0][:LENGTH].tolist()
    for _ in range(LENGTH):
        logits = model(np.int32([words[-LENGTH:]]))[0, -1].numpy()
        words.append(int(np.argmax(logits + rng.gumbel(size=WORDS))))  # a draw of the softmax
    print(" ".join(VOCABULARY[number] for number in words))
    return history


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
