"""Learning rate schedule, joint clipping of dense and sparse gradients, and their updates."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch

from ngame.config import StageConfig
from ngame.training.adam import AdamW, SparseAdam
from ngame.training.optimizer import Optimizer, ParameterGroup, clip


def test_learning_rates_rise_and_fall():
    """Parameters with sparse gradients have their own rate on the same schedule."""
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True), torch.nn.Linear(2, 2))
    config = StageConfig(warmup=0.25, clip=0)
    optimizer = Optimizer([ParameterGroup(module, 0.4, 0.8)], config, 8)
    rates = {"dense": [], "sparse": []}
    for _ in range(8):
        module(torch.tensor([0, 2])).sum().backward()
        optimizer.step()
        for kind, found in rates.items():
            found.append(optimizer._optimizers[kind].groups[0]["lr"])
    shares = [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates["dense"] == pytest.approx([0.4 * share for share in shares])
    assert rates["sparse"] == pytest.approx([0.8 * share for share in shares])


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_counts_sparse_and_dense_gradients_together(limit):
    table = torch.nn.Embedding(4, 2, sparse=True)
    dense = torch.nn.Linear(2, 1)
    table(torch.tensor([1, 1, 3])).matmul(dense.weight.T).sum().backward()
    parameters = [table.weight, dense.weight]
    before = [p.grad.to_dense().clone() for p in parameters]
    norm = math.sqrt(sum(float(g.square().sum()) for g in before))
    clip([*parameters, dense.bias], limit)
    scale = min(1, limit / norm)
    for old, parameter in zip(before, parameters, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), old * scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_adam_is_that_of_pytorch(dtype):
    """In the core or not; rows that come twice or never, and a table without a gradient."""
    torch.manual_seed(0)
    start = torch.randn(6, 5, dtype=dtype)
    tables = [torch.nn.Embedding(6, 5, sparse=True, dtype=dtype) for _ in range(3)]
    for table in tables:
        table.weight.data.copy_(start)
    ours = SparseAdam([{"params": [tables[0].weight, tables[2].weight], "lr": 0.1}])
    theirs = torch.optim.SparseAdam([tables[1].weight], lr=0.1)
    for ids in ([1, 4, 4], [0, 1], [5], [1, 2, 3]):
        scale = torch.randn(len(ids), 5, dtype=dtype)
        for table, optimizer in zip(tables[:2], (ours, theirs), strict=True):
            optimizer.zero_grad()
            (table(torch.tensor(ids)) * scale).sum().backward()
            optimizer.step()
        torch.testing.assert_close(tables[0].weight, tables[1].weight)
    assert (tables[2].weight == start).all()
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_that_of_pytorch(dtype):
    """Groups with rates of their own, which change; a parameter without a gradient now and then."""
    torch.manual_seed(0)
    pairs = [
        [torch.nn.Parameter(value.clone()) for _ in range(2)]
        for value in (torch.randn(4, 3, dtype=dtype), torch.randn(5, dtype=dtype), torch.ones(2))
    ]
    ours, theirs = (
        make(
            [
                {"params": [p[who] for p in pairs[:2]], "lr": 0.1},
                {"params": [pairs[2][who]], "lr": 0.1},
            ]
        )
        for who, make in enumerate((adamw, torch.optim.AdamW))
    )
    for step in range(4):
        for number, pair in enumerate(pairs):
            gradient = torch.randn_like(pair[0])
            for p in pair:
                p.grad = gradient.clone() if number != 1 or step % 2 else None
        for groups in (ours.groups, theirs.param_groups):
            groups[1]["lr"] = 0.2 / (step + 1)
        ours.step()
        theirs.step()
        for mine, its in pairs:
            assert torch.equal(mine, its)
    assert_same_state(ours, theirs)


def adamw(groups):
    """Ours, with the weight decay that PyTorch's has by default."""
    return AdamW(groups, 0.01)


def assert_same_state(ours, theirs):
    """The same names and values, so that a checkpoint of the one is one of the other."""
    state = {}
    for number, values in theirs.state_dict()["state"].items():
        state |= {f"{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
    assert ours.tensors().keys() == state.keys()
    for name, value in ours.tensors().items():
        torch.testing.assert_close(value, state[name], check_dtype=not name.endswith("step"))


def test_training_does_not_import_the_compiler():
    """It takes longer than a small data set trains."""
    code = """
        import sys
        import torch
        from ngame.config import StageConfig
        from ngame.training.optimizer import Optimizer, ParameterGroup
        table = torch.nn.Embedding(3, 2, sparse=True)
        module = torch.nn.Sequential(table, torch.nn.Linear(2, 2))
        optimizer = Optimizer([ParameterGroup(module, 0.1, 0.1)], StageConfig(), 1)
        module(torch.tensor([0, 2])).sum().backward()
        optimizer.step()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
