"""Adds programs to TensorFlow's graphs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tff_optim.resident.clients.in_process.program import IF, WHILE, Operation, Program, Value

Tensors = dict[Value, tf.Tensor]
# Replacements by the kind of an operation. Each takes the operation and its inputs, and returns the
# result, or None to leave the operation as it is.
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
      forms: Replacements of operations.
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
    # Vectorising needs known shapes; in a `loop` they are unknown.
    shapes = [value.shape if forms else tf.TensorShape(None) for value in body.inputs]
    # This puts its constants into the loop around it, so that they end with it.
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

    `tf.while_loop` passes every tensor that its body uses from one iteration to the next, by three
    operations each, which takes half of the time for small models. This loop passes the state alone.

    Args:
      condition: Takes the state and `others`; returns whether there is another iteration.
      body: Takes the state and `others`; returns the new state. Neither `condition` nor `body` may use
        tensors from outside, or add operations without inputs.
      state: The state before the first iteration. Each iteration must compute its first part from
        itself, as in a counter.
      others: A structure of the tensors that `condition` and `body` use besides.
      parallel_iterations: The largest number of iterations that run at a time.

    Returns:
      The state after the last iteration.
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
    # The second input, which does not exist yet, comes from the iteration before.
    merged = [tf.raw_ops.Merge(inputs=[one, one]).output for one in entered]
    goes_on = tf.raw_ops.LoopCond(input=condition(merged, inside))
    parted = [tf.raw_ops.Switch(data=one, pred=goes_on) for one in merged]
    new = body([one.output_true for one in parted], inside)
    merged[0].op._update_input(1, tf.raw_ops.NextIteration(data=new[0]))
    # A value that does not depend on the state also exists after the last iteration, and would
    # begin another.
    with tf.control_dependencies(new[:1]):
        for before, after in zip(merged[1:], new[1:], strict=True):
            before.op._update_input(1, tf.raw_ops.NextIteration(data=after))
    return [tf.raw_ops.Exit(data=one.output_false) for one in parted]
