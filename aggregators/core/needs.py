"""The measurements that a rule asks of its clients."""

from collections import OrderedDict
from typing import Literal, TypeAlias

import attrs

from aggregators.core import checks
from aggregators.core.candidates import Candidates
from aggregators.core.layers import Layers, check_layers
from aggregators.core.score import Score, as_score
from aggregators.core.stateful_client import StatefulClient

LossAt: TypeAlias = Literal["training", "initial"]


@attrs.frozen
class Needs:
    """The measurements that a rule needs from clients besides their updates.

    They are fields of the `ClientUpdate` that the rule gets.

    Attributes:
      score: How far each layer moved, in `scores`; None if not needed.
      layers: The groups of tensors that are scored and weighed together; see
        `aggregators.core.layers.resolve_layers`.
      loss: `"training"`: the loss before each batch's own step, as a mean over examples. `"initial"`:
        the loss of the weights that training starts from, which takes one more forward pass over the
        data. In `loss`.
      steps: Whether the number of optimizer steps is needed, in `steps`.
      candidates: Models that clients score on their data, with one forward pass each, in
        `candidate_errors` and `errors_are_losses`; None for none. They depend on the rule's state, so
        only `build_fed_avg` supports them.
      stateful_client: The state that clients keep between rounds and use in training; the part that
        they send is in `sent`. Only `build_fed_avg` supports such clients.

    Example:
      >>> from aggregators import scores
      >>> Needs(score=scores.kl_divergence, loss="training").names
      ('kl_divergence', 'training_loss')
    """

    score: Score | None = attrs.field(default=None, converter=attrs.converters.optional(as_score))
    layers: Layers = attrs.field(
        default="tensor", validator=checks.validated(lambda name, value: check_layers(value))
    )
    loss: LossAt | None = attrs.field(
        default=None, validator=checks.validated(checks.word, "training", "initial", optional=True)
    )
    steps: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    candidates: Candidates | None = attrs.field(
        default=None, validator=checks.validated(checks.instance, Candidates, optional=True)
    )
    stateful_client: StatefulClient | None = attrs.field(
        default=None, validator=checks.validated(checks.instance, StatefulClient, optional=True)
    )

    def __attrs_post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                "`score` must have a name that no other measurement has; found "
                f"{self.score.name!r}. Give it another: `Score(f, name=...)`."  # type: ignore[union-attr]
            )

    @property
    def fields(self) -> OrderedDict[str, str]:
        """The measured fields of `ClientUpdate`, and their names in `MeasuredUpdate`."""
        found = OrderedDict()
        if self.score is not None:
            found["scores"] = self.score.name
        if self.loss is not None:
            found["loss"] = {"training": "training_loss", "initial": "initial_loss"}[self.loss]
        if self.steps:
            found["steps"] = "steps"
        if self.candidates is not None:
            found.update(candidate_errors="candidate_errors", errors_are_losses="errors_are_losses")
        if self.stateful_client is not None:
            found["sent"] = "sent"
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names in `MeasuredUpdate.measured`, which say which score or loss it is."""
        return tuple(self.fields.values())


def check_no_process(argument: str, needs: Needs) -> None:
    """Raises `ValueError` for needs that only `build_fed_avg` supports."""
    for what, found, hint in (
        ("candidates", needs.candidates, ' `jury_mean(votes="direction")` has none.'),
        ("a stateful client", needs.stateful_client, ""),
    ):
        if found is not None:
            raise ValueError(
                f"`{argument}` must not need {what}, which only a whole process supports; found "
                f"{found!r}. Build it with `build_fed_avg(..., rule=rule)`.{hint}"
            )
