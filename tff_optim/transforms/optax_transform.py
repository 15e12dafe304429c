"""An optax transformation as a gradient transform."""

import attrs

from tff_optim.backends.optax.optimizer import OptaxOptimizer, build_optax_optimizer
from tff_optim.core.types import Value
from tff_optim.transforms.from_optimizer import FromOptimizer, probe


def _of_gradients(given: Value) -> OptaxOptimizer:
    """The transformation, checked to depend on gradients alone and to keep their sign."""
    optimizer = given if isinstance(given, OptaxOptimizer) else build_optax_optimizer(given)
    probed = probe(optimizer)
    if probed.depends_on_weights:
        raise ValueError(
            "`optimizer` of `OptaxTransform` must depend on gradients alone; found a transformation "
            "whose updates depend on the values of the weights. Use the pipeline's weight decay, or "
            "`tff_optim.build_optax_optimizer` on its own."
        )
    if probed.is_descent:
        raise ValueError(
            "`optimizer` of `OptaxTransform` must keep the sign of gradients, as "
            "`optax.scale_by_adam()` does; found a transformation that reverses it, as whole "
            "optimizers do. Leave its learning rate out: the pipeline has its own."
        )
    return optimizer


@attrs.frozen
class OptaxTransform(FromOptimizer):
    """Replaces gradients by the updates of an optax transformation, as `optax.chain` does.

    One pipeline may so combine parts of Keras, optax and this package. State and hparams are those of
    `tff_optim.build_optax_optimizer`, in the gradients' dtypes. Two kinds are refused after some trial
    steps: a transformation whose updates depend on the values of the weights, and a whole optimizer such
    as `optax.adam(0.1)`, which would bring a second learning rate.

    Attributes:
      optimizer: An `optax.GradientTransformation`, a callable without arguments that returns one, or
        the result of `tff_optim.build_optax_optimizer`, in which the factory's numbers are hparams.

    Example:
      >>> import optax
      >>> import tensorflow as tf
      >>> import tff_optim
      >>> belief = tff_optim.build_optax_optimizer(optax.scale_by_belief, b1=0.8)
      >>> part = OptaxTransform(belief)
      >>> state = part.initialize([tf.TensorSpec([])])
      >>> list(part.get_hparams(state))
      ['b1', 'b2', 'eps', 'eps_root']
      >>> clip = OptaxTransform(optax.clip(2.0))
      >>> _, gradients = clip.next(clip.initialize([tf.TensorSpec([])]), [5.0], [tf.constant(-7.0)])
      >>> gradients[0].numpy()
      -2.0
    """

    optimizer: OptaxOptimizer = attrs.field(converter=_of_gradients)
