"""How the copies of a model divide the servers, and a stage's buckets, among them."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_tempo.config import Config
from megatron_tempo.config.choices import EngineKind, Transport
from megatron_tempo.config.rules.rollout import check
from megatron_tempo.config.schema import ClusterConfig
from megatron_tempo.rollout.server_nodes import whole_copies
from megatron_tempo.rollout.transfer import Fed, rounds
from megatron_tempo.weights.param_mapping import ParamMapping, Replicated
from megatron_tempo.weights.pieces import PartName, dealt, planned_buckets


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("servers", [1, 2, 3, 4, 5, 8, 13])
def test_each_server_gets_each_share_once_and_each_copy_sends_as_much(servers: int, copies: int) -> None:
    sent: Counter[tuple[int, int]] = Counter()  # by server and share
    for copy in range(copies):
        mine = rounds(servers, copies, copy)
        for share, targets in mine:
            assert share.count in (1, copies)
            sent.update((server, copies * number) for server in targets for number in share.taken if share.count == 1)
            sent.update((server, number) for server in targets for number in share.taken if share.count > 1)
        load = sum(len(share.taken) / share.count * len(targets) for share, targets in mine)
        assert load == pytest.approx(servers / copies)
        taken = [(share.count, number) for share, _ in mine for number in share.taken]
        assert len(taken) == len(set(taken)), "no bucket is made twice"
        assert len({server for _, targets in mine for server in targets}) <= servers // copies + 2, "few groups"
    assert max(sent.values()) == 1
    for server in range(servers):
        numbers = sorted(number for one, number in sent if one == server)
        assert numbers in ([0], list(range(copies)))


@pytest.mark.parametrize(("nodes", "copies", "servers"), [(2, 1, 1), (2, 2, 3), (3, 8, 2), (8, 2, 5)])
def test_a_node_divides_its_own_servers_among_its_own_copies(nodes: int, copies: int, servers: int) -> None:
    """`copies` and `servers` of each node. The last node has copies and no servers."""
    groups = [Fed(tuple(range(n * servers, (n + 1) * servers)), tuple(range(n * copies, (n + 1) * copies)))
              for n in range(nodes - 1)]  # fmt: skip
    parts: Counter[int] = Counter()
    for copy in range(nodes * copies):
        mine = [one for group in groups for one in group.rounds(copy)]
        assert {server // servers for _, targets in mine for server in targets} <= {copy // copies}
        assert all(share.senders == copies for share, _ in mine), "that make buffers on this machine"
        assert mine or copy >= (nodes - 1) * copies
        for share, targets in mine:
            for server in targets:
                parts[server] += len(share.taken) * copies // share.count
    assert parts == dict.fromkeys(range((nodes - 1) * servers), copies), "each server gets everything once"


def test_a_node_with_servers_holds_a_whole_copy_of_the_model_exactly_where_the_rules_say_so() -> None:
    """Against Megatron's own numbering of the ranks, and the copies that a run would find on each machine."""
    for nodes, trainers, each, pipeline, tensor in product(
        (2, 3), (1, 2, 3, 4, 6), (True, False), (1, 2), (1, 2, 3, 4)
    ):
        world = nodes * trainers
        if world % (tensor * pipeline):
            continue
        order = RankGenerator(tensor, 1, world // tensor // pipeline, pipeline, 1, "tp-cp-ep-dp-pp")
        copy_of = {rank: copy for copy, ranks in enumerate(order.get_ranks("tp-pp")) for rank in ranks}
        whole = whole_copies([(f"node{rank // trainers}", copy_of[rank]) for rank in range(world)])
        config = Config(cluster=ClusterConfig(nodes=nodes))
        config.rollout.engine, config.rollout.servers.python = EngineKind.vllm, "sh"
        config.rollout.servers.transport, config.rollout.servers.each_node = Transport.shared, each
        config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
        fields = {problem.field for problem in check(config, world)}
        refused = bool(fields & {"parallel.tensor", "parallel.pipeline"})
        holding = [bool(whole.get(f"node{node}")) for node in range(nodes if each else 1)]
        assert refused != all(holding), (nodes, trainers, each, pipeline, tensor)


def mapping(name: str, rows: int) -> ParamMapping:
    return ParamMapping(name, (f"model.{name}",), ((rows, 8),), Replicated(), stage=0)


def test_shares_are_about_equal_and_keep_the_parts_of_a_tensor_together() -> None:
    rows = [640, *(4 + 12 * (number % 5) for number in range(40)), 200]
    mappings = [mapping(f"layer{number}", count) for number, count in enumerate(rows)]
    for parts in (False, True):
        buckets = planned_buckets(mappings, 64 * 8 * 4, 4, parts=parts)
        largest = max(64 * 8, *(one.numel for one in mappings))
        for count in (1, 2, 3, 5):
            shares = dealt(buckets, count)
            loads = [
                sum(bucket.numel for bucket, share in zip(buckets, shares, strict=True) if share == number)
                for number in range(count)
            ]
            assert sum(loads) == sum(one.numel for one in mappings)
            assert max(loads) - min(loads) <= largest
            homes: dict[str, set[int]] = {}
            for bucket, share in zip(buckets, shares, strict=True):
                for piece in (piece for message in bucket.messages for piece in message):
                    for name, _ in piece.tensors():
                        homes.setdefault(name.whole if isinstance(name, PartName) else name, set()).add(share)
            assert all(len(home) == 1 for home in homes.values())


def test_more_copies_than_buckets_leave_some_without_work() -> None:
    buckets = planned_buckets([mapping("a", 4), mapping("b", 4)], 4 * 8 * 4, 4, parts=True)
    assert sorted(dealt(buckets, 5)) == [0, 1]
