"""What `import ngame` costs those who only cluster or evaluate."""

import subprocess
import sys

MEASURE = """
import time
import numpy, scipy.sparse
start = time.process_time()
import ngame
print(time.process_time() - start)
"""


def test_import_costs_little_beyond_numpy_and_scipy():
    # Processor time, the least of a few processes, so that other work on the machine hardly tells.
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", MEASURE], text=True)) for _ in range(3)
    ]
    assert min(seconds) <= 0.05, seconds
