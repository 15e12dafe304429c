"""Gradients of single examples, clipped before they are summed: DP-SGD on a client."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client.batch_rows import check_parts, count_rows, take_rows
from aggregators.core import checks
from aggregators.core.types import Batch, Gradients, ModelFn, Tensors, Weights

Counts: TypeAlias = Mapping[str, tf.Tensor]

# Named, because "auto_select" may give other numbers on another device.
_ALGORITHM = "philox"
_MOVING_AVERAGES = ("moving_mean", "moving_variance")


def _names(value: object) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(
            f'`shared_parts` must be a sequence of names such as ["x/positions"]; found {value!r}.'
        )
    return names


@attrs.frozen
class ExampleClipping:
    """Clips each example's gradient, sums, adds noise once a batch, and divides by the batch's size.

    ```
    g = (sum_i g_i min(1, C / |g_i|) + N(0, (z s)^2)) / B
    ```

    with `g_i` the gradient of the loss of example `i` alone, `C` the norm, `z` the noise multiplier,
    `B` the expected size of a batch (without one, the number of its examples that are finite), and
    `s` what one example can move the sum by: `C`, or `C sqrt(number of tensors)` with `per_tensor`.
    An optimizer takes `g` for the gradient of the batch; it equals that for an infinite norm where
    the model's loss is a mean over examples.

    The first dimension of a batch's parts counts its examples. Parts that all examples share, such as
    positions, class weights, an adjacency matrix or a scalar, have to be named in `shared_parts`; each
    example is given them whole. Other parts without the batch's rows are refused: when the process is
    built if the model's `input_spec` shows it, else by the client that meets them. A shared part must
    not depend on the examples beside it, or one example moves all gradients and the norm bounds nothing.

    Examples go through the model one by one, in training mode, and memory is that of one example and
    one gradient. So any model that trains on a batch of one can be clipped, also with dropout,
    recurrent layers or embeddings. Batch normalisation looks at several examples at once and is
    refused. The model's metrics see each batch whole, in one more forward pass: they are those of
    training without clipping, at the same weights.

    An example whose gradient has no finite norm counts for nothing: neither in the sum, nor in `B`
    where that is counted, nor in the client's weight, loss and metrics. The measurements count it.

    The measurements `clipped_examples`, `non_finite_examples` and `mean_norm` are exact: no noise
    protects them. Nor does it protect the client's weight, its number of examples. For a guarantee per
    example use `ClientWeighting.UNIFORM` and keep the measurements private.
    `aggregators.privacy.epsilon` says what the noise is worth. TensorFlow's generator is not
    cryptographic.

    Without a seed each batch draws new noise, of a generator that the system's entropy has started, also
    after a restore. Rounds that are trained again from a checkpoint therefore reveal their data twice.

    With a seed the noise is a function of the seed, the round in the process's state, the client's
    number in `ClientStates` if there is one, the step, and the bits of the batch. A run that goes on
    from a checkpoint, on any device, draws the noise of an undisturbed run. Clients without a number
    that have the same batch at the same step share its noise. Anyone who knows the seed can test
    whether a guessed batch was used. Two runs with the same seed and data share their noise, so their
    difference reveals the exact difference of the gradients. So a seed is for experiments that must be
    repeated. If you publish anything of such a run, draw its seed at random (`secrets.randbits(63)`),
    use it once, and keep it secret. It is a constant of the process's computations, not a part of its
    state.

    Attributes:
      clip_norm: `C`, above 0; infinity to leave out gradients that are not finite and do no more.
      noise_multiplier: `z`, at least 0 and finite; above 0 needs a finite norm and an expected size.
      expected_batch_size: `B`, above 0; None for the number of examples.
      per_tensor: Whether each tensor of a gradient is clipped to `C` by itself, as declearn's
        `sclip_norm` does, instead of all of them by one factor. This changes the gradient's direction,
        and the noise grows by `sqrt(number of tensors)`.
      seed: The seed of the noise, from 0 to 2**63 - 1; None for the system's entropy.
      shared_parts: Names of the parts of a batch that have no rows, or of structures of them: keys, and
        positions in a sequence, joined by `/`, such as `"x/positions"` or `"0/1"`.

    Example:
      >>> ExampleClipping(1.0, noise_multiplier=1.1, expected_batch_size=32).noise_stddev(2)
      1.1

    Example: batches of `{"x": {"image": ..., "class_weights": ...}, "y": ...}`

      >>> ExampleClipping(1.0, shared_parts=["x/class_weights"]).shared_parts
      ('x/class_weights',)

    Source: Abadi et al., Deep Learning with Differential Privacy, CCS 2016, Algorithm 1.
    """

    clip_norm: float = attrs.field()
    noise_multiplier: float = 0.0
    expected_batch_size: float | None = None
    per_tensor: bool = attrs.field(
        default=False, kw_only=True, validator=checks.validated(checks.flag)
    )
    seed: int | None = attrs.field(default=None, kw_only=True)
    shared_parts: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_names)

    def __attrs_post_init__(self) -> None:
        positive = checks.Range(0.0, above=True)
        if self.clip_norm != math.inf:
            checks.number("clip_norm", self.clip_norm, positive, more=", or infinity")
        checks.number("noise_multiplier", self.noise_multiplier, checks.Range(0.0))
        if self.expected_batch_size is not None:
            checks.number("expected_batch_size", self.expected_batch_size, positive)
        if self.seed is not None and checks.whole("seed", self.seed, 0) >= 2**63:
            raise ValueError(f"`seed` must be below 2**63; found {self.seed}.")
        if self.noise_multiplier and self.expected_batch_size is None:
            raise ValueError(
                "`expected_batch_size` must be given with noise, since the number of examples in a "
                "batch would reveal whether one is there; found None. Give the size of batches, or "
                "their mean size."
            )
        if self.noise_multiplier and math.isinf(self.clip_norm):
            raise ValueError(
                "`clip_norm` must be finite with noise, which is a multiple of it; found inf."
            )

    def noise_stddev(self, num_tensors: int) -> float:
        """Standard deviation of the noise in the sum over a batch."""
        sensitivity = self.clip_norm * (math.sqrt(num_tensors) if self.per_tensor else 1.0)
        return self.noise_multiplier and self.noise_multiplier * sensitivity


class Clipped(NamedTuple):
    """A batch's gradient, by its examples.

    Attributes:
      gradients: As an optimizer takes them: dense, None for a weight that the loss does not see.
      loss: float32: mean loss of the examples that count.
      examples: int32: how many do.
      counts: For `measurements`: int64 `examples`, `clipped`, `non_finite`, and float32 `norms`, the
        sum of the norms.
      kept: bool: for each row, whether it counts.
    """

    gradients: Gradients
    loss: tf.Tensor
    examples: tf.Tensor
    counts: Counts
    kept: tf.Tensor


def no_counts(clipping: ExampleClipping | None) -> Counts:
    """The counts of no batch; empty where nothing is clipped."""
    if clipping is None:
        return OrderedDict()
    none = tf.constant(0, tf.int64)
    return OrderedDict(examples=none, clipped=none, non_finite=none, norms=tf.constant(0.0))


def clip_examples(
    clipping: ExampleClipping,
    batch: Batch,
    weights: Weights,
    one: Callable[[Batch], tuple[Gradients, tf.Tensor]],
    *,
    noise_position: Tensors = (),
) -> Clipped:
    """The gradient of a batch; see `ExampleClipping`.

    Args:
      clipping: How to clip.
      batch: A structure of tensors; the first dimension of all but the shared parts counts examples.
      weights: The trainable weights.
      one: `batch of one -> (gradients, loss)`.
      noise_position: Whole numbers by which batches differ, such as round and step: for noise of a seed.
    """
    known: list[bool] = []
    wide = [tf.float32 if w.dtype.size < 4 else w.dtype for w in weights]  # what sums are taken in

    size, batch = count_rows(batch, clipping.shared_parts)
    positions = tf.range(size)

    def step(
        i: tf.Tensor, sums: Tensors, loss: tf.Tensor, counts: Counts, kept: tf.Tensor
    ) -> Tensors:
        example = take_rows(batch, clipping.shared_parts, lambda x: x[i : i + 1])
        gradients, its_loss = one(example)
        known[:] = [g is not None for g in gradients]
        dense = [
            tf.zeros(w.shape, kind) if g is None else tf.cast(tf.convert_to_tensor(g), kind)
            for w, g, kind in zip(weights, gradients, wide, strict=True)
        ]
        norms = tf.stack([tf.cast(tf.norm(g), tf.float64) for g in dense])
        norm = tf.norm(norms)
        counts_it = tf.math.is_finite(norm)
        factors = tf.minimum(clipping.clip_norm / (norms if clipping.per_tensor else norm), 1.0)
        factors = tf.broadcast_to(factors, norms.shape)
        sums = tuple(
            total + tf.where(counts_it, tf.cast(factors[k], g.dtype) * g, tf.zeros_like(g))
            for k, (total, g) in enumerate(zip(sums, dense, strict=True))
        )
        its_loss = tf.cast(tf.reduce_mean(its_loss), tf.float32)
        counts = OrderedDict(
            examples=counts["examples"] + tf.cast(counts_it, tf.int64),
            clipped=counts["clipped"] + tf.cast(counts_it & tf.reduce_any(factors < 1.0), tf.int64),
            non_finite=counts["non_finite"] + tf.cast(~counts_it, tf.int64),
            norms=counts["norms"] + tf.where(counts_it, tf.cast(norm, tf.float32), 0.0),
        )
        loss += tf.where(counts_it, its_loss, 0.0)
        kept |= counts_it & tf.equal(positions, i)
        return i + 1, sums, loss, counts, kept

    zeros = tuple(tf.zeros(w.shape, kind) for w, kind in zip(weights, wide, strict=True))
    state = (tf.constant(0), zeros, tf.constant(0.0), no_counts(clipping), positions < 0)
    _, sums, loss, counts, kept = tf.while_loop(lambda i, *_: i < size, step, state)
    examples = tf.cast(counts["examples"], tf.int32)
    stddev = clipping.noise_stddev(len(weights))
    if stddev:
        key = _noise_key(clipping.seed, noise_position, batch)
        sums = [total + _noise(total, stddev, key, k) for k, total in enumerate(sums)]
    divisor = clipping.expected_batch_size
    divisor = tf.cast(examples if divisor is None else divisor, tf.float32)
    gradients = tuple(
        tf.cast(tf.math.divide_no_nan(total, tf.cast(divisor, total.dtype)), w.dtype)
        if there
        else None
        for total, w, there in zip(sums, weights, known, strict=True)
    )
    mean_loss = tf.math.divide_no_nan(loss, tf.cast(examples, tf.float32))
    return Clipped(gradients, mean_loss, examples, counts, kept)


def add_counts(total: Counts, found: Counts) -> Counts:
    """Adds a batch's counts."""
    return tf.nest.map_structure(tf.add, total, found)


def _noise_key(seed: int | None, noise_position: Tensors, batch: Batch) -> tf.Tensor | None:
    """int64 of shape [2], from which a batch's noise is drawn; None without a seed."""
    if seed is None:
        return None
    key = tf.constant([seed, 0], tf.int64)
    for number in noise_position:
        key = _fold(key, tf.cast(number, tf.int64))
    for tensor in tf.nest.flatten(batch):
        row = tf.reshape(tensor, [1, tf.size(tensor)])
        key = _fold(key, tf.bitcast(tf.fingerprint(row), tf.int64)[0])
    return key


def _fold(key: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(key, number, alg=_ALGORITHM)


def _noise(like: tf.Tensor, stddev: float, key: tf.Tensor | None, position: int) -> tf.Tensor:
    if key is None:
        # Not `tf.random.normal`: after `tf.random.set_seed` its numbers are frozen into the graph,
        # and all clients would draw the same. Nor a stateless generator, which TensorFlow does not
        # vectorise.
        return stddev * tf.raw_ops.RandomStandardNormal(shape=like.shape, dtype=like.dtype)
    key = _fold(key, tf.constant(position, tf.int64))
    return tf.random.stateless_normal(like.shape, key, 0.0, stddev, like.dtype, alg=_ALGORITHM)


@tff.tensorflow.computation
def _measurements(counts: Counts) -> OrderedDict[str, tf.Tensor]:
    return OrderedDict(
        clipped_examples=counts["clipped"],
        non_finite_examples=counts["non_finite"],
        mean_norm=tf.math.divide_no_nan(counts["norms"], tf.cast(counts["examples"], tf.float32)),
    )


def measurements(counts: tff.Value) -> tff.Value:
    """The round's measurements: `{counts}@CLIENTS -> M@SERVER`."""
    return tff.federated_map(_measurements, tff.federated_sum(counts))


def check_examples_are_apart(model_fn: ModelFn, clipping: ExampleClipping) -> None:
    """Raises `ValueError` for a model whose batches cannot be taken apart into examples.

    Either a part has no rows, or the model has batch normalisation, known by the names of its moving
    averages. TFF's functional models of Keras cannot have it.
    """
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        check_parts(model_fn.input_spec, clipping.shared_parts)
        return
    with tf.Graph().as_default():
        model = model_fn()
        check_parts(model.input_spec, clipping.shared_parts)
        names = [v.name.split(":")[0] for v in model.non_trainable_variables]
    found = [name for name in names if name.endswith(_MOVING_AVERAGES)]
    if found:
        raise ValueError(
            "`example_clipping` must be given to a model that trains on each example alone; found "
            f"batch normalisation, with {', '.join(found)}. Use layer or group normalisation."
        )
