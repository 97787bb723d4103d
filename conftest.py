"""What makes ``pytest`` and ``pytest --nbval notebooks/01*.ipynb`` work as typed.

The whole suite runs on all cores; named files or tests run in this process, unless ``-n`` says
otherwise. Notebooks run on the kernel of this environment.
"""

import gc
import importlib
import itertools
import os
import tempfile

import pytest

# Before anything imports TensorFlow, OpenMP or NumPy; workers and kernels inherit them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what it says would stand in outputs
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the cores to others
# What JAX compiles here computes a few steps: code that is made quickly is better than quick code.
quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", quickly)
# OpenBLAS' threads spin while they wait: beside another process, eigenvalues took 11 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads its options in the same hook
def pytest_cmdline_main(config):
    option = config.option
    if hasattr(config, "workerinput"):
        return
    if option.nbval or option.nbval_lax:
        option.numprocesses = 0  # a notebook's cells belong to one kernel
        option.nbval_current_env = not option.nbval_kernel_name
        reach_kernels_by_files()
        # Where its cache of fonts is missing, it says in the outputs that it makes one.
        importlib.import_module("matplotlib.font_manager")
        rules = config.rootpath / "tests" / "nbval_sanitize.cfg"
        option.nbval_sanitize_with = option.nbval_sanitize_with or str(rules)
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if whole and option.numprocesses is None and not option.usepdb:
        option.numprocesses = "auto"
    if option.numprocesses:
        # All cores are busy: threads that wait for work would only take turns with those that have.
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
        os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"  # what the tests of a file share is made once
        # Files in the order below, not by their number of tests.
        option.loadscopereorder = option.loadscopereorder and option.markexpr != "long"


def reach_kernels_by_files():
    """A cluster under test beside a notebook could take the port of its kernel."""
    from nbval import kernel

    from tools.pipeline import reached_by_files

    folder, numbers = tempfile.TemporaryDirectory(prefix="kernels"), itertools.count()

    class ByFiles(kernel.KernelManager):
        def __init__(self, **settings):
            super().__init__(**reached_by_files(f"{folder.name}/{next(numbers)}"), **settings)

    kernel.KernelManager = ByFiles


def pytest_collection_modifyitems(items):
    # The longest first: begun last, they would keep one process busy while the others wait.
    # Milvus last: in a process where its gRPC has threads, Ray, which forks, does not always start.
    items.sort(
        key=lambda item: (
            item.get_closest_marker("rehearsal") is None,
            item.path.name == "test_milvus.py",
        )
    )


def pytest_collection_finish():
    # TensorFlow has a million objects, which each search for garbage would look at again.
    gc.collect()
    gc.freeze()
