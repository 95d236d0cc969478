"""What this machine can do at most, measured: bytes moved and operations done in a second.

    OPENBLAS_NUM_THREADS=1 python bench/limits.py

prints JSON, by the number of threads: ``copy`` and ``read``, of memory much larger than the caches,
in bytes a second (a copied byte counts twice: it is read and written); ``product``, a float32
matrix product by NumPy's BLAS, in operations a second (a multiplication and an addition are two).
Each is the best of several rounds. The threads are Python's, so BLAS itself must have one.
"""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROUNDS = 7
BYTES = 1 << 29  # of the memory that is read, all threads together
SIDE = 2048  # of the matrices


def main() -> None:
    """Measure on one thread, then on every CPU this process may use."""
    threads = sorted({1, len(os.sched_getaffinity(0))})
    print(json.dumps({count: measure(count) for count in threads}))


def measure(threads: int) -> dict[str, float]:
    """The limits for a number of threads, each on its own memory."""
    source = np.ones((threads, BYTES // 4 // threads), np.float32)
    target = np.zeros_like(source)
    factors = np.ones((threads, SIDE, SIDE), np.float32)
    products = np.zeros_like(factors)

    def copy(thread: int) -> None:
        np.copyto(target[thread], source[thread])

    def read(thread: int) -> None:
        np.dot(source[thread], source[thread])

    def product(thread: int) -> None:
        np.matmul(factors[thread], factors[thread], out=products[thread])

    with ThreadPoolExecutor(threads) as pool:

        def best(work: Callable[[int], None]) -> float:
            seconds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                seconds.append(time.perf_counter() - start)
            return min(seconds)

        return {
            "copy": 2 * source.nbytes / best(copy),
            "read": source.nbytes / best(read),
            "product": 2 * SIDE**3 * threads / best(product),
        }


if __name__ == "__main__":
    main()
