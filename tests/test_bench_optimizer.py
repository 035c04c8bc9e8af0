"""Bench of the optimiser's step: our step and the foreach rival are right, a wrong step is found, and the contender
`copy` moves as many bytes as the case states."""

import dataclasses

import pytest
import torch
from bench_runs import CPU
from standins import spied

from jasper_fast.bench.cases import optimizer


@pytest.fixture
def case(run):
    return optimizer.case(run, "small")


def runners(case):
    return {c.name: c.build() for c in case.contenders}


@pytest.mark.parametrize("name", ["jasper_fast", "foreach"])
def test_a_step_is_right_and_one_without_decay_is_not(case, name, monkeypatch):
    case.refill(1)
    low, exact = case.low(), case.reference()
    runner = runners(case)[name]
    for _ in range(2):  # twice, because a comparison must restore the tensors
        assert case.complaints(runner.outputs(), low, exact) == []
    monkeypatch.setattr(optimizer, "WEIGHT_DECAY", 0.0)
    assert any("moment" in line for line in case.complaints(runners(case)[name].outputs(), low, exact))


def test_our_step_runs_on_the_run_s_backend(run, monkeypatch):
    seen = spied(monkeypatch, optimizer, "NovoGrad", lambda *of, **how: how["backend"])
    for backend in ("reference", "auto"):
        optimizer.case(dataclasses.replace(run, backend=backend), "small").contenders[0].build()
    assert seen == ["reference", "auto"]


def test_the_copy_moves_half_of_the_bytes_twice(case):
    inputs = optimizer.Inputs(optimizer.models.config("small"), CPU)
    count = case.key["parameters"]
    assert count <= inputs.flat[0].numel() < 1.01 * count and inputs.flat.numel() == 4 * inputs.flat[0].numel()
    optimizer.copying(inputs).run()
    assert torch.equal(inputs.flat[2:], inputs.flat[:2])
    assert case.nbytes == 32 * count


def test_both_forms_move_the_same_tensors(case):
    before = case.low()
    runners(case)["foreach"].run()
    assert not any(torch.equal(before[key], after) for key, after in case.low().items())
