"""One fault of every kind, at a seeded moment of a training; benchmarks/chaos.py injects a hundred."""

from __future__ import annotations

from types import ModuleType

import pytest
from from_benchmarks import import_benchmark

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    return import_benchmark("chaos")


def test_every_kind_of_fault_is_survived(chaos, tiny_bloom, monkeypatch):
    monkeypatch.setattr(chaos, "PARTED_S", 10.0)  # which is noticed after 8
    with chaos.Chaos(tiny_bloom(seed=4)) as swarm:
        faults = chaos.disturbed(swarm, list(chaos.KINDS), seed=1)
        assert [fault.kind for fault in faults] == list(chaos.KINDS)
        assert not [(fault.kind, str(fault.moment)) for fault in faults if not fault.is_equal]


@pytest.mark.slow  # minutes
def test_every_kind_of_fault_is_survived_without_replicas(chaos, tiny_bloom):
    kinds = [kind for kind in chaos.KINDS if kind != chaos.NEW]
    with chaos.Chaos(tiny_bloom(seed=4), has_replicas=False) as swarm:
        faults = chaos.disturbed(swarm, kinds, seed=2)
        assert not [(fault.kind, str(fault.moment)) for fault in faults if not fault.is_equal]


@pytest.mark.slow  # test_run.py has each of these for a local model
def test_runs_are_continued_whatever_befalls_the_trainer(chaos, two_servers):
    runs = chaos.trainers_disturbed(two_servers, times=1)
    assert runs.keys() == chaos.TRAINERS.keys()
    assert all(all(outcomes) for outcomes in runs.values()), runs


@pytest.mark.slow
def test_a_server_that_loads_its_blocks_anew_is_survived(chaos, tiny_bloom):
    times, is_equal = chaos.rebalanced(tiny_bloom(seed=4), 10.0)
    assert times > 0
    assert is_equal
