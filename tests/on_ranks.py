"""What every process runs in test_ranks.py: cases by name, the outcome of each written to a file per rank.

torchrun --nproc-per-node 2 tests/on_ranks.py FOLDER CASE...
"""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_models import (
    NORMAL,
    SEED,
    Model,
    assert_same_as_reference,
    assert_same_check,
    distributed,
    in_one_process,
    on_meta,
    plan_for,
    reference,
    train_one_step,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gainstage as gs
from gainstage.apply import apply, materialize, param_init_fn
from gainstage.errors import InputError, NonFiniteError, PlanMismatchError, RankError
from gainstage.graph import held


def placed(*placements):
    def case():
        shape = (dist.get_world_size(),) if len(placements) == 1 else (2, 2)
        model = distributed(Model(), init_device_mesh("cpu", shape), placements)
        apply(model, plan_for(Model()), seed=SEED)
        assert_same_as_reference(model)

    return case


def fully_sharded(dtype=torch.float32, **options):
    def case():
        model = on_meta(dtype)
        plan = plan_for(model)
        fully_shard(model.mixer, **options)
        fully_shard(model, **options)
        materialize(model, plan, seed=SEED)
        assert_same_as_reference(model, dtype)
        if dtype == torch.float32:
            expected = train_one_step(reference())
            # Every process has the same batch: only the order of sums differs.
            assert abs(train_one_step(model) - expected) < 1e-5 * expected
        apply(model, plan, seed=SEED)  # the root is still gathered after its pass
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), dict(reference(dtype).named_parameters())[name]), name

    return case


def tensor_parallel():
    model = on_meta()
    plan = plan_for(model)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"fused": ColwiseParallel()})
    materialize(model, plan, seed=SEED)
    assert_same_as_reference(model)


def two_dimensions():
    """Tensor parallel first, then FSDP2 over it: shards of one dimension whose order is not that of the ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = on_meta()
    plan = plan_for(model)
    parallelize_module(model, mesh["tensor"], {"fused": ColwiseParallel(), "head": RowwiseParallel()})
    model.embedding.weight = model.head.weight
    fully_shard(model, mesh=mesh["data"])
    assert any(type(placement).__name__ == "_StridedShard" for placement in model.fused.weight.placements)
    materialize(model, plan, seed=SEED)
    assert_same_as_reference(model)


def planned_on_each_rank():
    """Nobody sends a plan: it is the same on all ranks, as the exchange of its hash shows."""
    model = on_meta()
    plan = gs.plan(model, (torch.zeros(2, 7, dtype=torch.long, device="meta"),))
    fully_shard(model.mixer)
    fully_shard(model)
    gs.materialize(model, plan, seed=SEED)
    expected = Model()
    gs.apply(expected, plan, seed=SEED)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), parameter), name
    assert train_one_step(model) == pytest.approx(train_one_step(expected), rel=1e-5)


def learning_rates():
    """Sizes of what is kept, and gradients, are those of whole parameters."""
    tokens = torch.arange(14).view(2, 7) % 11
    expected, model = Model(), Model()
    model.load_state_dict(expected.state_dict())
    plan = gs.plan(expected, (tokens,), keep=["mixer.weight"])
    kept = expected.mixer.weight.detach().clone().fill_(0.1)
    kept[0] = 3.0  # on one rank only
    for each in (expected, model):
        gs.apply(each, plan, seed=SEED)
        each.mixer.weight.data.copy_(kept)
    fully_shard(model)
    found = []
    for each in (expected, model):
        nn.functional.cross_entropy(each(tokens).flatten(0, 1), tokens.flatten()).backward()
        gradients = {name: parameter.grad for name, parameter in each.named_parameters()}
        for optimizer in ("adam", "sgd", "adafactor", "muon"):
            groups = gs.param_groups(each, plan, optimizer=optimizer, weight_decay=0.1, gradients=gradients)
            rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
            found.append([rates[name] for name in plan.parameters])
    # bfloat16 rounds what is the same up to the order of sums.
    assert found[:3] == [pytest.approx(rates, rel=1e-4) for rates in found[4:7]]
    assert found[3] == pytest.approx(found[7], rel=0.02)


def measured_inputs():
    """Each rank passes over its part; all have the moments of the whole, and weights that differ in last bits at most."""
    data = torch.randn(403, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12) + 100.0
    dist.broadcast(data, 0)
    part = data[dist.get_rank() :: dist.get_world_size()]
    found = gs.measure_inputs(part.split(50), progress=False)
    whole = data.double().numpy()
    np.testing.assert_allclose(found.covariance, np.cov(whole.T, bias=True), rtol=1e-10)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-14)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 2))
    fully_shard(model)
    plan = gs.plan(nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 2)), (data[:8],), inputs=found)
    gs.apply(model, plan, seed=SEED)  # raises where the plans of the ranks differ in any bit
    y = data @ model[0].weight.full_tensor().T + model[0].bias.full_tensor()
    assert torch.allclose(y.var(0, correction=0).mean(), torch.tensor(1.0), rtol=0.05)
    with pytest.raises(InputError if dist.get_rank() == 0 else RankError, match="yields nothing"):
        gs.measure_inputs([] if dist.get_rank() == 0 else part.split(50), progress=False)


def own_part(tokens):
    return tokens.tensor_split(dist.get_world_size())[dist.get_rank()]


TOKENS = torch.randint(11, (9, 7), generator=torch.Generator().manual_seed(1))


@cache
def verified_alone(*, is_planned):
    """A model whose weights are not all as planned, the plan, and what one process finds on the whole batch."""
    model = Model().eval()
    plan = gs.initialize(model, (TOKENS,), seed=SEED)
    with torch.no_grad():
        model.fused.weight.mul_(4.0)
    given = plan if is_planned else None
    return model, given, in_one_process(model, (TOKENS,), plan=given)


def verified(shard, part=own_part):
    """With a plan, and without."""

    def case():
        for is_planned in (True, False):
            original, plan, expected = verified_alone(is_planned=is_planned)
            assert ("fused.weight" in {finding.where for finding in expected.findings}) == is_planned, expected
            assert len(expected.rows) == 7
            model = Model().eval()
            model.load_state_dict(original.state_dict())
            model = shard(model)
            before = {name: held(parameter).clone() for name, parameter in model.named_parameters()}
            assert_same_check(gs.verify(model, (part(TOKENS),), plan=plan), expected)
            for name, parameter in model.named_parameters():
                assert torch.equal(held(parameter), before[name]), name

    return case


def by_fully_shard(model):
    fully_shard(model.mixer)
    fully_shard(model)
    return model


def by_flattening(*, use_orig_params):
    def shard(model):
        inner = FullyShardedDataParallel(model.fused, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        model.fused = inner
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    return shard


def by_tensor_parallel(model):
    """Local slices, partial sums, and whole DTensors on the way."""
    styles = {"fused": ColwiseParallel(output_layouts=Replicate()), "first": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), styles)


class Wide(nn.Sequential):
    """A pair of layers with a slice of what lies between on each process."""

    def __init__(self):
        super().__init__(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5))


def verified_slices():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    expected = Wide()
    plan = gs.initialize(expected, (x,), seed=SEED)
    model = Wide()
    model.load_state_dict(expected.state_dict())
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    check = gs.verify(model, (x,), plan=plan)
    assert check.ok, check
    assert_same_check(check, in_one_process(expected, (x,), plan=plan))


def verified_before_it_exists():
    """Streamed, each rank with its part."""
    model = on_meta().eval()
    plan = gs.plan(model, (TOKENS,))
    expected = in_one_process(model, (TOKENS,), plan=plan, seed=SEED)
    assert expected.ok, expected
    assert_same_check(gs.verify(by_fully_shard(model), (own_part(TOKENS),), plan=plan, seed=SEED), expected)


def verified_with_another_plan():
    plan = plan_for(Model(), **({} if dist.get_rank() else {"fused.bias": {"distribution": NORMAL}}))
    with pytest.raises(RankError, match="disagree on the plan, the model or its values: ranks 0: "):
        gs.verify(sharded_model(), (TOKENS,), plan=plan)
    is_bad = dist.get_rank() == 1
    with pytest.raises(NonFiniteError if is_bad else RankError, match="NaN or infinity in input 0"):
        gs.verify(Wide(), (torch.full((2, 6), float("nan") if is_bad else 1.0),))
    torch.manual_seed(dist.get_rank())
    with pytest.raises(RankError, match="disagree on the plan, the model or its values"):
        gs.verify(Wide(), (torch.ones(2, 6),))


def flattened(*, use_orig_params):
    def case():
        expected = reference()
        model = on_meta()
        initialize = param_init_fn(model, plan_for(model), seed=SEED)
        wrapped = FullyShardedDataParallel(
            model, param_init_fn=initialize, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        for seed in (None, SEED):
            if seed is not None:
                apply(wrapped, plan_for(Model()), seed=SEED + 1)
                apply(wrapped, plan_for(Model()), seed=SEED)
            with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
                for name, parameter in expected.named_parameters():
                    assert torch.equal(wrapped.module.get_parameter(name), parameter), name
            for name, buffer in expected.named_buffers():
                assert torch.equal(wrapped.module.get_buffer(name), buffer), name
        loss = train_one_step(expected)
        assert abs(train_one_step(wrapped) - loss) < 1e-5 * loss

    return case


def sharded_model():
    model = Model()
    fully_shard(model)
    return model


def locals_of(model):
    return {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}


def assert_refused(model, plan, error, message, *, seed=SEED, timeout=20.0):
    """At once, and with every value as it was."""
    before = locals_of(model)
    start = time.monotonic()
    with pytest.raises(error, match=message):
        apply(model, plan, seed=seed, timeout=timeout)
    assert time.monotonic() - start < 10
    for name, value in locals_of(model).items():
        assert torch.equal(value, before[name]), name


def another_plan_on_one_rank():
    model = sharded_model()
    last = dist.get_rank() == dist.get_world_size() - 1
    plan = plan_for(Model(), **({"fused.bias": {"distribution": NORMAL}} if last else {}))
    assert_refused(model, plan, RankError, "disagree on the plan or the seed")


def another_seed_on_one_rank():
    assert_refused(sharded_model(), plan_for(Model()), RankError, "ranks 0: ", seed=dist.get_rank())


def a_model_that_fits_on_all_ranks_but_one():
    model = sharded_model()
    misfit = dist.get_rank() == 1
    plan = plan_for(Model(12)) if misfit else plan_for(Model())
    expected = (PlanMismatchError, "is planned as") if misfit else (RankError, "Rank 1 failed: embedding.weight is planned as")
    assert_refused(model, plan, *expected)


def a_failure_while_one_rank_draws():
    """The values of all ranks go back."""
    model = sharded_model()
    before = locals_of(model)
    failing = dist.get_rank() == 1

    def progress(done, total):
        if failing and done == total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if failing else RankError):
        apply(model, plan_for(Model()), seed=SEED, progress=progress, timeout=20.0)
    for name, value in locals_of(model).items():
        assert torch.equal(value, before[name]), name


def a_rank_that_does_not_come():
    """Rank 1 makes no call; the others give up after their second."""
    model = sharded_model()
    if dist.get_rank() != 1:
        assert_refused(model, plan_for(Model()), RankError, "Rank 1 does not answer", timeout=1.0)
    dist.barrier()


def a_rank_that_is_killed():
    """Rank 1 dies; nobody waits for it for longer than was said. Last, as no collective works after it."""
    model = sharded_model()
    if dist.get_rank() == 1:
        os._exit(0)
    assert_refused(model, plan_for(Model()), RankError, "Rank 1 does not answer", timeout=1.0)


CASES = {
    "rows": placed(Shard(0)),
    "columns": placed(Shard(1)),
    "taps": placed(Shard(2)),
    "copies": placed(Replicate()),
    "rows and rows": placed(Shard(0), Shard(0)),
    "rows and columns": placed(Shard(0), Shard(1)),
    "columns and rows": placed(Shard(1), Shard(0)),
    "copies of columns": placed(Replicate(), Shard(1)),
    "taps and columns": placed(Shard(2), Shard(1)),
    "fully_shard": fully_sharded(),
    "fully_shard, bfloat16": fully_sharded(torch.bfloat16),
    "fully_shard, offloaded": fully_sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "tensor parallel": tensor_parallel,
    "fully_shard over tensor parallel": two_dimensions,
    "flattened": flattened(use_orig_params=False),
    "flattened, original parameters": flattened(use_orig_params=True),
    "planned on each rank": planned_on_each_rank,
    "learning rates": learning_rates,
    "measured inputs": measured_inputs,
    "verified": verified(lambda model: model),
    "verified, fully_shard": verified(by_fully_shard),
    "verified, FSDP1": verified(by_flattening(use_orig_params=False)),
    "verified, FSDP1 with parameters": verified(by_flattening(use_orig_params=True)),
    "verified, DDP": verified(nn.parallel.DistributedDataParallel),
    "verified, tensor parallel": verified(by_tensor_parallel, part=lambda tokens: tokens),
    "verified, slices": verified_slices,
    "verified before it exists": verified_before_it_exists,
    "verified with another plan": verified_with_another_plan,
    "another plan": another_plan_on_one_rank,
    "another seed": another_seed_on_one_rank,
    "another model": a_model_that_fits_on_all_ranks_but_one,
    "a failure": a_failure_while_one_rank_draws,
    "an absent rank": a_rank_that_does_not_come,
    "a killed rank": a_rank_that_is_killed,
}


def main(folder, *names):
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    outcomes = {}
    for name in names:
        start = time.monotonic()
        torch.manual_seed(dist.get_rank())
        try:
            CASES[name]()
            outcomes[name] = "passed"
        except BaseException:  # noqa: BLE001  (the report says which)
            outcomes[name] = traceback.format_exc()
        outcomes[name + " took"] = time.monotonic() - start
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    os._exit(0)  # a process group with a dead member does not always shut down


if __name__ == "__main__":
    main(*sys.argv[1:])
