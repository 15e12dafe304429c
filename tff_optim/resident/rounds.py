"""One round on values that stay in the workers."""

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import handover
from tff_optim.resident.handover import Carrier
from tff_optim.resident.host import CohortExecutor, Host
from tff_optim.resident.mergeable import MergeableRound
from tff_optim.resident.references import Resident


async def _results(state_carrier: Carrier, executor: CohortExecutor, output: Any) -> Any:
    """Splits a round's output into the state, left in the worker, and the metrics."""
    state = await executor.select(output, 0)
    metrics = await (await executor.select(output, 1)).compute()
    await handover.wait(state_carrier, executor, state)
    return Resident(state_carrier, executor, state), metrics


def whole_round(
    next_native: Any, data_type: tff.Type, state: Resident, client_data: Sequence[Any]
) -> tuple[Resident, Any]:
    """Runs a process's own `next` on all clients at once."""
    host = state.executor.host

    async def work() -> Any:
        executor = host.executor(len(client_data))
        value = await handover.move(state.carrier, state.executor, state.value, executor)
        data = await executor.create(list(client_data), data_type)
        return await _results(
            state.carrier, executor, await executor.call(next_native, value, data)
        )

    return host.run(work)


def round_in_pieces(
    parts: MergeableRound,
    data_type: tff.Type,
    state: Resident,
    shares: list[list[Sequence[Any]]],
    hosts: Sequence[Host],
) -> tuple[Resident, Any]:
    """Runs `next` piece by piece, each worker on its share, and merges at the first worker.

    Memory in a worker: the state, two aggregates, and what one piece of clients needs.
    """
    home = hosts[0]
    assert state.executor.host is home
    with contextlib.ExitStack() as files:
        copies = _Copies(state, shares, hosts, files)
        calls = [
            host.start(_share_work(parts, data_type, state, share, host, copies))
            for host, share in list(zip(hosts, shares, strict=False))[1:]
        ]
        first = home.start(_share_work(parts, data_type, state, shares[0], home, copies))
        try:
            results: list[Any] = [home.finish(first)]
            for host, call in zip(hosts[1:], calls, strict=False):
                results.append(host.finish(call))
        except BaseException:
            for call in [first, *calls]:
                call.abandoned = True
            raise
    executor, merged, argument = results[0]
    partials = [_at_home(parts.carrier, home, *result[:2]) for result in results[1:]]

    async def finish() -> Any:
        total = merged
        for bring in partials:
            total = await executor.call(parts.merge, total, await bring(executor))
        return await _results(
            state.carrier, executor, await executor.call(parts.after_merge, argument, total)
        )

    return home.run(finish)


class _Copies:
    """The state's copies for a round: written once, read wherever a piece runs."""

    def __init__(
        self,
        state: Resident,
        shares: list[list[Sequence[Any]]],
        hosts: Sequence[Host],
        files: contextlib.ExitStack,
    ):
        self._state = state
        self.prefix: str | None = None
        self.arrays: list[Any] | None = None
        carrier, source = state.carrier, state.executor
        elsewhere = {(i, len(piece)) for i, share in enumerate(shares) for piece in share} - {
            (0, source.num_clients)
        }
        if not elsewhere:
            return
        size = handover.leaves.num_bytes(carrier.type)
        used = [hosts[i] for i in sorted({0} | {i for i, _ in elsewhere})]
        if carrier.save is not None and all(handover.has_room(host, size) for host in used):
            self.prefix = files.enter_context(handover.Exchange(source.host))
            prefix = self.prefix
            source.host.run(lambda: handover.save_in_worker(carrier, source, state.value, prefix))
        else:
            self.arrays = state.fetch()

    async def at(self, executor: CohortExecutor) -> Any:
        """The state in an executor."""
        if executor is self._state.executor:
            return self._state.value
        if self.prefix is not None:
            return await handover.load_in_worker(self._state.carrier, executor, self.prefix)
        assert self.arrays is not None
        return await handover.put(self._state.carrier, executor, self.arrays)


def _share_work(
    parts: MergeableRound,
    data_type: tff.Type,
    state: Resident,
    share: list[Sequence[Any]],
    host: Host,
    copies: _Copies,
) -> Any:
    """Returns the work of one worker: its pieces one after the other, merged as they come."""

    async def work() -> tuple[CohortExecutor, Any, Any]:
        main = host.executor(len(share[0]))
        main_state = await copies.at(main)
        main_argument = None
        total = None
        for piece in share:
            executor = host.executor(len(piece))
            here = main_state if executor is main else await copies.at(executor)
            data = await executor.create(list(piece), data_type)
            argument = await executor.struct(here, data)
            if main_argument is None:
                main_argument = argument
            partial = await executor.call(parts.up_to_merge, argument)
            del here, data, argument
            # Without this wait the worker would run all pieces, and hold their memory, at once.
            await handover.wait(parts.carrier, executor, partial)
            partial = await handover.move(parts.carrier, executor, partial, main)
            total = partial if total is None else await main.call(parts.merge, total, partial)
            del partial
            await handover.wait(parts.carrier, main, total)
        return main, total, main_argument

    del state  # what it holds comes through `copies`
    return work


def _at_home(carrier: Carrier, home: Host, source: CohortExecutor, value: Any) -> Any:
    """Brings an aggregate of another worker within reach of the first one."""
    size = handover.leaves.num_bytes(carrier.type)
    shared = (
        carrier.save is not None
        and handover.has_room(source.host, size)
        and handover.has_room(home, size)
    )
    if not shared:
        arrays = source.host.run(lambda: handover.fetch(carrier, source, value))

        async def bring(executor: CohortExecutor) -> Any:
            return await handover.put(carrier, executor, arrays)

        return bring
    exchange = handover.Exchange(home)
    source.host.run(lambda: handover.save_in_worker(carrier, source, value, exchange.prefix))

    async def read(executor: CohortExecutor) -> Any:
        with exchange as prefix:
            return await handover.load_in_worker(carrier, executor, prefix)

    return read
