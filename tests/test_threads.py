"""TensorFlow and Faiss, each with its own thread pool, live in one process in either import order.

A second OpenMP runtime in the process crashes it or spoils its numbers. Each order gets a fresh
process that convolves and searches in turns, then from two threads at once, and checks each result.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import {first}
import {second}
import sys
import threading

import numpy as np

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)  # as lib/search/exact.py does

rng = np.random.default_rng(0)
image = rng.normal(size=(4, 64, 64, 32)).astype("float32")
kernel = rng.normal(size=(3, 3, 32, 64)).astype("float32")
# One output point by hand: output (20, 30) of a "VALID" convolution sees rows 20-22, columns 30-32.
expected_point = np.einsum("ijc,ijco->o", image[1, 20:23, 30:33], kernel)

database = rng.normal(size=(4000, 128)).astype("float32")
queries = rng.normal(size=(64, 128)).astype("float32")
expected_nearest = (queries @ database.T).argmax(axis=1)


def convolve():
    output = tensorflow.nn.conv2d(image, kernel, strides=1, padding="VALID").numpy()
    np.testing.assert_allclose(output[1, 20, 30], expected_point, rtol=1e-3, atol=1e-3)


def search():
    index = faiss.IndexFlatIP(128)
    index.add(database)
    assert (index.search(queries, 1)[1][:, 0] == expected_nearest).all()


done = []


def repeat(*steps):
    for _ in range(5):
        for step in steps:
            step()
    done.append(steps)


repeat(convolve, search)
threads = [threading.Thread(target=repeat, args=(step,)) for step in (convolve, search)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(done) == 3, "a thread failed"
print("right numbers")
"""


@pytest.mark.long
def test_convolution_and_search_share_a_process():
    orders = [("tensorflow", "faiss"), ("faiss", "tensorflow")]
    processes = [  # both at once: most of the time goes into importing TensorFlow
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(first=first, second=second)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, second in orders
    ]
    for order, process in zip(orders, processes, strict=True):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, (order, errors)
        assert output.strip() == "right numbers", order
