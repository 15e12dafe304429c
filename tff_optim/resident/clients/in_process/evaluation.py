"""Adds programs to TensorFlow's graphs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tff_optim.resident.clients.in_process.program import IF, WHILE, Operation, Program, Value

Tensors = dict[Value, tf.Tensor]
# By the kind of an operation, what takes its place: it is given the operation and its inputs, and
# returns the result, or None to leave it as it is.
Forms = Mapping[str, Callable[..., Any]]
_frames = itertools.count()


def evaluate(
    program: Program,
    inputs: Sequence[tf.Tensor],
    others: Mapping[Value, tf.Tensor],
    forms: Forms | None = None,
) -> list[tf.Tensor]:
    """Adds the operations of a program to the current graph; returns its results.

    Args:
      program: A program without a `SCAN`.
      inputs: Its inputs.
      others: The values from outside.
      forms: What takes the place of operations.
    """
    found = {**others, **dict(zip(program.inputs, inputs, strict=True))}
    add(program.operations, found, forms)
    return [found[value] for value in program.outputs]


def add(operations: Sequence[Operation], found: Tensors, forms: Forms | None = None) -> None:
    """Adds operations to the current graph, and their results to `found`."""
    forms = forms or {}
    for one in operations:
        inputs = [found[value] for value in one.inputs]
        if one.kind == IF:
            branches = [_branch(program, found, forms) for program in one.programs]
            results = tf.nest.flatten(tf.cond(inputs[0], *branches))
        elif one.kind == WHILE:
            results = _while(one, inputs, found, forms)
        elif one.kind in forms and (other := forms[one.kind](one, *inputs)) is not None:
            results = [other]
        else:
            results = (
                tf.compat.v1.get_default_graph()
                .create_op(
                    one.kind,
                    inputs,
                    [value.dtype for value in one.outputs],
                    attrs=one.attributes,
                )
                .outputs
            )
        found.update(zip(one.outputs, results, strict=True))


def _branch(program: Program, found: Tensors, forms: Forms) -> Callable[[], list[tf.Tensor]]:
    return lambda: [tf.identity(result) for result in evaluate(program, [], found, forms)]


def _while(
    one: Operation, inputs: list[tf.Tensor], found: Tensors, forms: Forms
) -> list[tf.Tensor]:
    condition, body = one.programs
    # To vectorise it, shapes have to be known; in a `loop` they are not.
    shapes = [value.shape if forms else tf.TensorShape(None) for value in body.inputs]
    # So that its constants are in a loop around it, and end with that.
    with tf.control_dependencies([found[value] for value in one.uses]):
        return list(
            tf.while_loop(
                lambda *state: evaluate(condition, state, found, forms)[0],
                lambda *state: evaluate(body, state, found, forms),
                inputs,
                shape_invariants=shapes,
            )
        )


Loop = Callable[[list[tf.Tensor], Any], Any]


def loop(
    condition: Loop,
    body: Loop,
    state: Sequence[tf.Tensor],
    others: Any,
    parallel_iterations: int,
) -> list[tf.Tensor]:
    """Adds a loop to a graph without automatic control dependencies.

    `tf.while_loop` hands on all that its body uses from turn to turn, by three operations each, which
    for small models is half of the time. Here only the state is handed on.

    Args:
      condition: Takes the state and `others`; returns whether there is another turn.
      body: Takes the same; returns the new state. As `condition` it may use nothing from outside, and
        add no operation without inputs.
      state: The state before the first turn. Its first part must be computed anew of itself in every
        turn, as a counter is.
      others: What both use besides: a structure of tensors.
      parallel_iterations: How many turns may be running at a time.

    Returns:
      The state after the last turn.
    """
    frame = f"loop_{next(_frames)}"

    def enter(tensor: tf.Tensor, is_constant: bool) -> tf.Tensor:
        return tf.raw_ops.Enter(
            data=tensor,
            frame_name=frame,
            is_constant=is_constant,
            parallel_iterations=parallel_iterations,
        )

    inside = tf.nest.map_structure(lambda tensor: enter(tensor, True), others)
    entered = [enter(tensor, False) for tensor in state]
    # The second input, which does not exist yet, is what the turn before has handed on.
    merged = [tf.raw_ops.Merge(inputs=[one, one]).output for one in entered]
    goes_on = tf.raw_ops.LoopCond(input=condition(merged, inside))
    parted = [tf.raw_ops.Switch(data=one, pred=goes_on) for one in merged]
    new = body([one.output_true for one in parted], inside)
    merged[0].op._update_input(1, tf.raw_ops.NextIteration(data=new[0]))
    # What does not depend on the state is there after the last turn, too, and would begin another.
    with tf.control_dependencies(new[:1]):
        for before, after in zip(merged[1:], new[1:], strict=True):
            before.op._update_input(1, tf.raw_ops.NextIteration(data=after))
    return [tf.raw_ops.Exit(data=one.output_false) for one in parted]
