"""The update of an embedding table by the rows that a batch touched, beside PyTorch's SparseAdam.

    pytest bench/bench_adam.py

Both run in this process, on the same gradients, with one thread.
"""

import pytest
import torch

from ngame.training.adam import SparseAdam


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("touched", [300, 3000, 12000])
def test_sparse_adam(benchmark, quick, touched, who):
    rows, dim = 30_000, 256
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, dim, generator=generator)
    ids = torch.randperm(rows, generator=generator)[:touched].sort().values[None]
    values = torch.randn(touched, dim, generator=generator)
    tables = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = (
        SparseAdam([{"params": [tables[0]], "lr": 1e-3}]),
        torch.optim.SparseAdam([tables[1]]),
    )

    def backward():
        for table in tables:
            table.grad = torch.sparse_coo_tensor(
                ids, values.clone(), start.shape, is_coalesced=True, check_invariants=False
            )

    for _ in range(3):
        backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(*tables)
    benchmark.extra_info["size"] = f"{touched:,} of {rows:,} rows x {dim}"
    step = optimizers[who == "torch"].step
    benchmark.pedantic(step, setup=backward, rounds=10 if quick else 50, warmup_rounds=2)
