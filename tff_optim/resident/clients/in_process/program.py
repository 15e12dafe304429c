"""Programs of operations on values: no calls, no variables, no data sets.

`recording` makes such a program of a client's graph. It then runs for many clients at once
(`side_by_side`), or for one client after the other (`one_by_one`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

IF, WHILE, SCAN = "If", "While", "Scan"
# Operations whose state only makes them draw other numbers each time.
RANDOM = frozenset(
    [
        "Multinomial",
        "NonDeterministicInts",
        "RandomGamma",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "TruncatedNormal",
    ]
)
_REDUCTIONS = frozenset(["All", "Any", "Max", "Mean", "Min", "Prod", "Sum"])


class NoProgramError(ValueError):
    """No program, or none for many clients at once, can stand for a client's graph.

    Args:
      found: The operation that cannot be part of it.
    """

    def __init__(self, found: str):
        self.found = found
        super().__init__(
            "`vectorize` needs a process whose clients TensorFlow can train side by side in one "
            f"program; found {found}. Leave `vectorize` out: clients are then trained one by one."
        )


class Value:
    """A tensor of a program.

    Attributes:
      dtype: The dtype.
      shape: The shape, as far as it is known.
      known: The number of a constant scalar, else None.
    """

    def __init__(self, dtype: Any, shape: Any, known: Any = None):
        self.dtype = dtype
        self.shape = shape
        self.known = known

    @classmethod
    def like(cls, other: Any) -> "Value":
        """A value of the dtype and the shape of a tensor or of another value."""
        return cls(other.dtype, other.shape)


@attrs.frozen(eq=False)
class Operation:
    """An operation of a program.

    Attributes:
      kind: TensorFlow's name, or one of `IF`, `WHILE`, `SCAN`.
      name: Its name in the graph.
      inputs: The condition of an `IF`; the initial state of a `WHILE` or `SCAN`.
      outputs: The results.
      attributes: TensorFlow's attributes.
      programs: The two branches of an `IF`, first the one for true; the condition and the body of a
        `WHILE`; the body of a `SCAN`, which takes the state and a batch. Values from outside may be
        used in all of them.
      source: For a `SCAN`, the leaf of the client's data that it iterates over.
    """

    kind: str
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attributes: dict[str, Any] = attrs.field(factory=dict)
    programs: tuple["Program", ...] = ()
    source: int | None = None

    @property
    def uses(self) -> set[Value]:
        """The values that the operation needs."""
        found = set(self.inputs)
        for program in self.programs:
            found |= program.uses
        return found


@attrs.frozen(eq=False)
class Program:
    """Operations in the order of their evaluation.

    Attributes:
      inputs: The given values.
      operations: The operations, without those that no result needs.
      outputs: The results.
      uses: Values from outside.
    """

    inputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Value, ...]
    uses: frozenset[Value] = attrs.field(init=False)

    def first(self, number: int, and_last: bool) -> "Program":
        """The same program with its first results alone, and with the last one if `and_last`."""
        outputs = (*self.outputs[:number], *self.outputs[len(self.outputs) - and_last :])
        return Program(self.inputs, self.operations, outputs)

    def with_others(self, names: dict[Value, Value]) -> "Program":
        """The same program with other values from outside."""
        if self.uses.isdisjoint(names):
            return self
        return Program(
            self.inputs,
            tuple(
                attrs.evolve(
                    operation,
                    inputs=tuple(names.get(value, value) for value in operation.inputs),
                    programs=tuple(one.with_others(names) for one in operation.programs),
                )
                for operation in self.operations
            ),
            tuple(names.get(value, value) for value in self.outputs),
        )

    def __attrs_post_init__(self) -> None:
        needed, kept = set(self.outputs), []
        for operation in reversed(self.operations):
            if not needed.isdisjoint(operation.outputs):
                needed |= operation.uses
                kept.append(operation)
        made = set(self.inputs).union(*(operation.outputs for operation in kept))
        object.__setattr__(self, "operations", tuple(reversed(kept)))
        object.__setattr__(self, "uses", frozenset(needed - made))


def kinds(operations: Iterable[Operation]) -> set[str]:
    """The kinds of operations, and of those in their programs."""
    found = set()
    for one in operations:
        found |= {one.kind}.union(*(kinds(program.operations) for program in one.programs))
    return found


def draws(one: Operation) -> bool:
    """Whether an operation draws random numbers, which differ between clients."""
    return not RANDOM.isdisjoint(kinds([one]))


def parted(program: Program, own: Iterable[Value] = ()) -> tuple[Program, Program]:
    """Splits a client's program into the part that all clients share, and the part of each client.

    Args:
      program: The program.
      own: The inputs that differ between clients.
    """
    varying = set(own)
    once, each = [], []
    for one in program.operations:
        if one.kind != SCAN and one.uses.isdisjoint(varying) and not draws(one):
            once.append(one)
        else:
            varying.update(one.outputs)
            each.append(one)
    made = tuple(value for one in once for value in one.outputs)
    inputs = tuple(value for value in program.inputs if value in varying)
    return Program(program.inputs, tuple(once), made), Program(inputs, tuple(each), program.outputs)


def simplified(program: Program) -> Program:
    """The same program, without repeated operations in the same loop or branch.

    The remaining operations and their inputs are the same, so results are equal to the bit.
    """
    return _without_repetition(program, {}, None)


def simplified_across_loops(program: Program) -> Program:
    """The same program, without repeated operations, and with constants outside of loops over data."""
    return _without_repetition(_with_constants_outside(program), {}, {})


def _with_constants_outside(program: Program) -> Program:
    operations: list[Operation] = []
    for one in program.operations:
        if one.kind == SCAN:
            (body,) = one.programs
            changing, inside = set(body.inputs), []
            for inner in body.operations:
                if inner.programs or inner.kind in RANDOM or not inner.uses.isdisjoint(changing):
                    changing.update(inner.outputs)
                    inside.append(inner)
                else:
                    operations.append(inner)
            body = Program(body.inputs, tuple(inside), body.outputs)
            one = attrs.evolve(one, programs=(body,))
        operations.append(one)
    return Program(program.inputs, tuple(operations), program.outputs)


def _given_back(one: Operation, inputs: Sequence[Value]) -> Value | None:
    """The input that an operation returns unchanged; None if it may change it."""
    if one.kind in _REDUCTIONS or one.kind == "Tile":
        return inputs[0] if inputs[1].shape == [0] else None  # over no axis; of a scalar
    if one.kind == "Reshape":
        return inputs[0] if inputs[0].shape == one.outputs[0].shape == [] else None
    if one.kind == "Mul" and inputs[0].dtype.is_floating:
        return next((x for x, y in (inputs, inputs[::-1]) if y.known == 1), None)
    return None


def _without_repetition(
    program: Program, names: dict[Value, Value], before: dict[Any, tuple[Value, ...]] | None
) -> Program:
    """Leaves out operations whose results exist already.

    Args:
      program: The program.
      names: Replacements of values from outside.
      before: The results of operations outside; None to repeat them inside.
    """
    names, made = dict(names), dict(before or {})
    operations = []
    for one in program.operations:
        inputs = tuple(names.get(value, value) for value in one.inputs)
        if (same := _given_back(one, inputs)) is not None:
            names[one.outputs[0]] = same
            continue
        programs = tuple(
            _without_repetition(inner, names, None if before is None else made)
            for inner in one.programs
        )
        if not programs and one.kind not in RANDOM:
            attributes = sorted((k, v.SerializeToString()) for k, v in one.attributes.items())
            key = (one.kind, inputs, tuple(attributes))
            if key in made:
                names.update(zip(one.outputs, made[key], strict=True))
                continue
            made[key] = one.outputs
        operations.append(attrs.evolve(one, inputs=inputs, programs=programs))
    outputs = tuple(names.get(value, value) for value in program.outputs)
    return Program(program.inputs, tuple(operations), outputs)
