"""What a server is asked to show that it is as it should be: its weights, and answers that are compared elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import httpx

from megatron_tempo.rollout.answer_checks import differing
from megatron_tempo.rollout.read_back import Selection
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter

# Checksum and root mean square of tensors, by name.
Expected = dict[str, tuple[str, float]]


async def weight_differences(
    adapter: ServerAdapter,
    ask: Callable[[Sequence[Call]], Awaitable[httpx.Response | None]],
    expected: Expected,
    selection: Selection,
) -> list[tuple[str, float]] | None:
    """Tensors that did not arrive as `expected` or, of the selected ones, are not installed so, the worst first.

    `ask` returns the answer to the last of some calls, or None if the server fails; so does this.
    """
    found: dict[str, float] = {}
    if (call := adapter.checksums()) is not None:
        if (answer := await ask([call])) is None:
            return None
        by_worker = [differing(expected, held) for held in adapter.parse_checksums(answer.json())]
        worst: list[tuple[str, float]] = max(by_worker, key=len, default=[])
        found = dict(worst)
    if (answer := await ask([adapter.read_back(selection)])) is None:
        return None
    missing = dict(adapter.not_installed(expected, selection, answer.json()))
    return list((found | {name: apart for name, apart in missing.items() if name not in found}).items())


async def wrong_weights(
    adapter: ServerAdapter,
    ask: Callable[[Sequence[Call]], Awaitable[httpx.Response | None]],
    expected: Expected,
    selection: Selection,
) -> str | None:
    """What is wrong with a server's weights, an empty text if nothing is; None if the server fails."""
    if not expected:
        return ""
    wrong = await weight_differences(adapter, ask, expected, selection)
    if not wrong:
        return None if wrong is None else ""
    return f"does not hold the actor's weights: {len(wrong)} of {len(expected)} tensors differ, first {wrong[0][0]}"
