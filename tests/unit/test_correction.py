"""The off-policy correction against the formulas, token by token in Python's floats, and its metrics by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.algorithm import correction
from megatron_tempo.algorithm.correction import by_staleness, correct, metrics
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from tests.support.tiny import ragged_batch

OLD = torch.tensor([0.5, 0.25, 0.5, 0.9]).log()
ENGINE = torch.tensor([0.25, 0.25, 0.1, 0.9]).log()  # token ratios 2, 1; 5; 1
LENGTHS = torch.tensor([2, 0, 1, 1])
TOKEN, SEQUENCE, GEOMETRIC = CorrectionLevel
TRUNCATE, MASK = OutOfBounds


def config_of(
    level: CorrectionLevel | None, what: OutOfBounds, low: float | None, high: float | None
) -> CorrectionConfig:
    return CorrectionConfig(level, what, low, high)


ROOT = math.sqrt(2)  # the geometric mean of 2 and 1
CASES = [
    (TOKEN, TRUNCATE, None, 1.5, [1.5, 1, 1.5, 1]),
    (TOKEN, TRUNCATE, 1.2, 3.0, [2, 1.2, 3, 1.2]),
    (TOKEN, MASK, None, 1.5, [0, 1, 0, 1]),
    (TOKEN, MASK, 1.2, 3.0, [2, 0, 0, 0]),
    (TOKEN, MASK, 0.5, 5.1, [2, 1, 5, 1]),
    (SEQUENCE, TRUNCATE, None, 3.0, [2, 2, 3, 1]),
    (SEQUENCE, TRUNCATE, 2.5, 3.0, [2.5, 2.5, 3, 2.5]),
    (SEQUENCE, MASK, None, 3.0, [2, 2, 0, 1]),
    (SEQUENCE, MASK, 1.5, 9.0, [2, 2, 5, 0]),
    (GEOMETRIC, TRUNCATE, None, 1.3, [1.3, 1.3, 1.3, 1]),
    (GEOMETRIC, TRUNCATE, 1.5, 9.0, [1.5, 1.5, 5, 1.5]),
    (GEOMETRIC, MASK, None, 3.0, [ROOT, ROOT, 0, 1]),
    (GEOMETRIC, MASK, 1.1, 1.3, [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("level", "what", "low", "high", "weights"), CASES)
def test_weights_by_hand(
    level: CorrectionLevel, what: OutOfBounds, low: float | None, high: float | None, weights: list[float]
) -> None:
    found = correct(OLD, ENGINE, LENGTHS, config_of(level, what, low, high)).weights
    assert found is not None
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(weights, rel=1e-6)


def formula(old: list[float], engine: list[float], lengths: list[int], config: CorrectionConfig) -> list[float]:
    """The docstring's formulas, with sums of Python's exact kind."""
    at, weights = 0, []
    for length in lengths:
        log_ratios = [a - b for a, b in zip(old[at : at + length], engine[at : at + length], strict=True)]
        total = math.fsum(log_ratios)
        for own in log_ratios:
            log_ratio = {TOKEN: own, SEQUENCE: total, GEOMETRIC: total / length}[config.level]  # type: ignore[index]
            ratio = math.exp(log_ratio)
            low, high = config.low or 0.0, config.high or math.inf
            if config.out_of_bounds is MASK:
                weights.append(ratio if low <= ratio <= high else 0.0)
            else:
                weights.append(min(max(ratio, low), high))
        at += length
    return weights


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.sampled_from(list(CorrectionLevel)),
    st.sampled_from(list(OutOfBounds)),
    st.sampled_from([None, 0.5, 0.9]),
    st.sampled_from([1.1, 2.0, 5.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_those_of_the_formulas(
    lengths: list[int], level: CorrectionLevel, what: OutOfBounds, low: float | None, high: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(lengths), generator=generator) - 0.1
    engine = old + 0.5 * torch.randn(sum(lengths), generator=generator)
    config = config_of(level, what, low, high)
    wanted = formula(old.tolist(), engine.tolist(), lengths, config)
    found = correct(old, engine, torch.tensor(lengths), config).weights
    assert found is not None
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("level", list(CorrectionLevel))
def test_a_response_has_its_weights_and_its_sums_to_the_bit_in_any_company(
    level: CorrectionLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on ranks that hold other rows, and in windows of any size."""
    generator, lengths = torch.Generator().manual_seed(3), [300, 0, 1, 70, 1000, 2]
    old, engine = (-torch.rand(sum(lengths), generator=generator) for _ in range(2))
    config = config_of(level, TRUNCATE, 0.5, 2.0)
    whole = correct(old, engine, torch.tensor(lengths), config)
    assert whole.weights is not None
    parts = zip(old.split(lengths), engine.split(lengths), strict=True)
    alone = [correct(*part, torch.tensor([n]), config) for part, n in zip(parts, lengths, strict=True)]
    assert torch.equal(torch.cat([one.weights for one in alone if one.weights is not None]), whole.weights)
    assert torch.equal(torch.cat([one.by_row for one in alone]), whole.by_row)
    for window in (1, 64, 400):
        monkeypatch.setattr(correction, "_WINDOW", window)
        again = correct(old, engine, torch.tensor(lengths), config)
        assert again.weights is not None
        assert torch.equal(again.weights, whole.weights)
        assert torch.equal(again.by_row, whole.by_row)


def test_metrics_by_hand() -> None:
    """Log-ratios ln 2, 0, ln 5, 0; token ratios 2 1 5 1, their sum 9 and the sum of their squares 31."""
    config = config_of(TOKEN, TRUNCATE, None, 1.5)  # weights 1.5 1 1.5 1
    found = metrics(correct(OLD, ENGINE, LENGTHS, config).by_row, LENGTHS, TOKEN)
    assert found == pytest.approx(
        {
            "engine/kl_k1": -math.log(10) / 4,
            "engine/kl_k3": (9 - 4 - math.log(10)) / 4,
            "engine/ess": 81 / (4 * 31),
            "correction/weight_mean": 5 / 4,
            "correction/ratio_min": 1.0,
            "correction/ratio_max": 5.0,
            "correction/ess": 25 / (4 * 6.5),
            "correction/tokens_out_of_bounds": 2 / 4,
            "correction/responses_out_of_bounds": 2 / 3,
            "correction/tokens_masked": 0.0,
            "correction/responses_masked": 0.0,
        },
        rel=1e-6,
    )


def test_the_divergence_by_staleness_by_hand() -> None:
    """Responses of ratios 2 1, none, 5 and 1, whose oldest tokens are 1, 0, 1 and 0 iterations old."""
    by_row = correct(OLD, ENGINE, LENGTHS, CorrectionConfig()).by_row
    found = by_staleness(by_row, LENGTHS, torch.tensor([1, 0, 1, 0]))
    wanted = {
        "engine/kl_k3_at_staleness_0": 0.0,
        "engine/kl_k3_at_staleness_1": (2 - 1 - math.log(2) + 0 + 5 - 1 - math.log(5)) / 3,
    }
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert by_staleness(by_row, LENGTHS, torch.zeros(4, dtype=torch.int64)) == {}


def test_staleness_of_rows_is_that_of_the_oldest_token() -> None:
    batch = ragged_batch(4)
    versions = torch.tensor([[0, 5, 1], [1, 3, 2], [1, 5, 1], [2, -1, 4], [3, 4, 2]])
    assert replace(batch, versions=versions).staleness(5).tolist() == [0, 2, 0, 1]


def test_metrics_of_masked_responses_by_hand() -> None:
    """Ratios 2, 5 and 1 of the three responses with tokens; 5 is masked."""
    found = metrics(correct(OLD, ENGINE, LENGTHS, config_of(SEQUENCE, MASK, None, 3.0)).by_row, LENGTHS, SEQUENCE)
    wanted = {
        "correction/weight_mean": (2 + 2 + 0 + 1) / 4,  # of tokens
        "correction/ratio_min": 1.0,
        "correction/ratio_max": 5.0,
        "correction/ess": 9 / (3 * 5),  # of responses with weights 2, 0, 1
        "correction/tokens_out_of_bounds": 1 / 4,
        "correction/responses_out_of_bounds": 1 / 3,
        "correction/tokens_masked": 1 / 4,
        "correction/responses_masked": 1 / 3,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


def test_without_a_correction_the_distance_is_measured_all_the_same() -> None:
    done = correct(OLD, ENGINE, LENGTHS, CorrectionConfig())
    assert done.weights is None
    found = metrics(done.by_row, LENGTHS, None)
    assert found.keys() == {"engine/kl_k1", "engine/kl_k3", "engine/ess"}
    assert found["engine/ess"] == pytest.approx(81 / 124)
    assert metrics(correct(OLD[:0], OLD[:0], LENGTHS[:0], CorrectionConfig()).by_row, LENGTHS[:0], None) == {}
    same = metrics(correct(OLD, OLD, LENGTHS, CorrectionConfig()).by_row, LENGTHS, None)
    assert same == {"engine/kl_k1": 0.0, "engine/kl_k3": 0.0, "engine/ess": 1.0}


def test_where_all_is_masked_nothing_is_left() -> None:
    found = metrics(correct(OLD, ENGINE, LENGTHS, config_of(GEOMETRIC, MASK, 1.1, 1.3)).by_row, LENGTHS, GEOMETRIC)
    assert (found["correction/ess"], found["correction/responses_masked"]) == (0.0, 1.0)


def test_k1_and_k3_estimate_the_divergence_of_the_engine_from_the_old_policy() -> None:
    """Over samples of the engine, both tend to KL(engine || old), here of two distributions over three tokens."""
    engine, old = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    drawn = torch.multinomial(engine, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([len(drawn)])
    found = metrics(correct(old.log()[drawn], engine.log()[drawn], lengths, CorrectionConfig()).by_row, lengths, None)
    exact = float((engine * (engine / old).log()).sum())
    assert found["engine/kl_k1"] == pytest.approx(exact, abs=3e-3)
    assert found["engine/kl_k3"] == pytest.approx(exact, abs=3e-4)


@pytest.mark.parametrize("level", list(CorrectionLevel))
@pytest.mark.parametrize("what", list(OutOfBounds))
def test_extremes_overflow_nothing_and_nan_is_not_masked(level: CorrectionLevel, what: OutOfBounds) -> None:
    old, engine = torch.tensor([0.0, -800.0, -1.0]), torch.tensor([-800.0, 0.0, -1.0])
    found = correct(old, engine, torch.tensor([1, 2]), config_of(level, what, None, 2.0))
    assert found.weights is not None
    assert found.weights.isfinite().all()
    assert found.by_row.isfinite().all()
    old[0] = math.nan
    lost = correct(old, engine, torch.tensor([1, 2]), config_of(level, what, 0.5, 2.0)).weights
    assert lost is not None
    assert lost.isnan().tolist() == [True, False, False]
