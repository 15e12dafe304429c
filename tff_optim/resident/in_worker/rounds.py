"""One round on values that stay in the workers."""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import parts as parts_lib
from tff_optim.resident.clients.in_workers import compiled, handover
from tff_optim.resident.clients.in_workers.compiled import MapReduceRound
from tff_optim.resident.clients.in_workers.connection import Executor, Host
from tff_optim.resident.clients.in_workers.handover import Carrier
from tff_optim.resident.in_worker.values import Resident


def clients_at_once(parts: MapReduceRound) -> int:
    """Enough clients to keep the cores busy, few enough for what they return to be in memory."""
    return parts_lib.clients_at_once(parts.context.type, least=8, most=128)


def map_reduce_round(
    parts: MapReduceRound,
    state: Resident,
    shares: Sequence[Sequence[Any]],
    hosts: Sequence[Host],
    clients_per_step: int,
) -> tuple[Resident, Any]:
    """Runs a round in MapReduce form, each worker on its share, merged at the first worker.

    Memory in a worker: the state, two aggregates, and what the clients of a step need.
    """
    home = hosts[0]
    assert state.executor.host is home
    if len(shares) == 1:

        async def work() -> Any:
            context = await state.executor.call(parts.prepare, state.value)
            total = await _add_up(parts, state.executor, context, shares[0], clients_per_step)
            return await _finish(parts, state, total)

        return home.run(work)

    async def prepare() -> Any:
        return await state.executor.call(parts.prepare, state.value)

    context = home.run(prepare)
    with contextlib.ExitStack() as files:
        sent = _within_reach(parts.context, state.executor, context, home, hosts, files)

        def share_work(host: Host, share: Sequence[Any]) -> Any:
            async def work() -> Any:
                executor = state.executor if host is home else host.own_executor()
                here = context if host is home else await sent(executor)
                total = await _add_up(parts, executor, here, share, clients_per_step)
                await handover.wait(parts.aggregate, executor, total)
                return total

            return work

        calls = [
            host.start(share_work(host, share)) for host, share in zip(hosts, shares, strict=True)
        ]
        totals = _finish_all(hosts, calls)
        arriving = [
            _within_reach(parts.aggregate, host.own_executor(), total, home, [host, home], files)
            for host, total in zip(hosts[1:], totals[1:], strict=True)
        ]

        async def merge() -> Any:
            total = totals[0]
            for arrive in arriving:
                total = await state.executor.call(parts.merge, total, await arrive(state.executor))
            return await _finish(parts, state, total)

        result = home.run(merge)
    return result


def aggregates(
    parts: MapReduceRound,
    context: list[Any],
    shares: Sequence[Sequence[Any]],
    hosts: Sequence[Host],
    clients_per_step: int,
) -> list[list[Any]]:
    """Runs clients on what Python sends them; returns each worker's aggregate, as its leaves."""

    def share_work(host: Host, share: Sequence[Any]) -> Any:
        async def work() -> list[Any]:
            executor = host.own_executor()
            here = await handover.put(parts.context, executor, context)
            total = await _add_up(parts, executor, here, share, clients_per_step)
            return await handover.fetch(parts.aggregate, executor, total)

        return work

    return _finish_all(
        hosts,
        [host.start(share_work(host, share)) for host, share in zip(hosts, shares, strict=True)],
    )


def _finish_all(hosts: Sequence[Host], calls: Sequence[Any]) -> list[Any]:
    try:
        return [host.finish(call) for host, call in zip(hosts, calls, strict=True)]
    except BaseException:
        for call in calls:
            call.abandoned = True
        raise


def _pieces(clients: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(clients), size):
        yield clients[begin : begin + size]


async def _add_up(
    parts: MapReduceRound,
    executor: Executor,
    context: Any,
    share: Sequence[Any],
    clients_per_step: int,
) -> Any:
    """Adds up the clients of a share, some side by side, in their order."""
    functions = [await executor.function(part) for part in (parts.work, parts.accumulate)]
    types = [part.type_signature for part in (parts.work, parts.accumulate)]
    total = await executor.call(parts.zero)
    for number, step in enumerate(_pieces(share, clients_per_step)):
        if number:
            # Without this wait the worker would run all clients, and hold their memory, at once.
            await handover.wait(parts.aggregate, executor, total)
            # A value in TFF's worker keeps what it was computed from; once it is there, what is
            # selected from it does not.
            total = await executor.call(parts.settle, total)
        # The worker begins with the first clients while others are still being sent: with so few
        # that it need not wait long for a call, and so many that Python need not make many.
        for group in _pieces(step, max(4, clients_per_step // 8)):
            add = compiled.add_clients(*types, len(group))
            data = await executor.create(list(group), add.type_signature.parameter[1])
            total = await executor.call(add, total, data, context, *functions)
    return total


async def _finish(parts: MapReduceRound, state: Resident, total: Any) -> Any:
    executor = state.executor
    output = await executor.call(parts.finish, state.value, total)
    # State and metrics come from one call of TensorFlow: with these, the state is there too.
    metrics = await (await executor.select(output, 1)).compute()
    # Selected only now, when it keeps nothing that it was computed from; see `_add_up`.
    new_state = await executor.select(output, 0)
    return Resident(state.carrier, executor, new_state), metrics


def _within_reach(
    carrier: Carrier,
    source: Executor,
    value: Any,
    home: Host,
    hosts: Sequence[Host],
    files: contextlib.ExitStack,
) -> Callable[[Executor], Awaitable[Any]]:
    """Brings a value of one of the hosts within reach of all: returns what takes it in there."""
    if all(handover.by_file(carrier, host) for host in hosts):
        with handover.unless_full(home):
            prefix = files.enter_context(handover.Exchange(home))
            source.host.run(lambda: handover.save_in_worker(carrier, source, value, prefix))
            return lambda executor: handover.load_in_worker(carrier, executor, prefix)
    arrays = source.host.run(lambda: handover.fetch(carrier, source, value, files=False))
    return lambda executor: handover.put(carrier, executor, arrays, files=False)


def whole_round(
    next_native: Any,
    placed: Carrier,
    data_type: tff.Type,
    state: Resident,
    client_data: Sequence[Any],
) -> tuple[Resident, Any]:
    """Runs a process's own `next` on all clients at once, where it has no MapReduce form."""
    host = state.executor.host

    async def work() -> Any:
        cohort = host.executor(len(client_data))
        value = await handover.move(state.carrier, state.executor, state.value, placed, cohort)
        data = await cohort.create(list(client_data), data_type)
        output = await cohort.call(next_native, value, data)
        metrics = await (await cohort.select(output, 1)).compute()
        value = await cohort.select(output, 0)
        value = await handover.move(placed, cohort, value, state.carrier, state.executor)
        return Resident(state.carrier, state.executor, value), metrics

    return host.run(work)
