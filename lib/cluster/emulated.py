"""Emulates a Ray cluster of several nodes on one machine, for tests and demonstrations.

with emulated_cluster(nodes=2) as cluster:      # this process is connected to it
    cluster.remove_node(cluster.worker_nodes[0], allow_graceful=False)    # kills a node
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ClusterError(RuntimeError):
    """The cluster can't do the work; the message says why, and what to change."""


def import_ray():
    """Import Ray without its usage reports; a ClusterError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers without a GPU keep their GPU variables; otherwise Ray warns.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        import ray
        import ray.data
        import ray.train
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"{error.name} is not installed: it comes with the extra cluster, by "
            "`make cluster` or pip install '.[cluster]'"
        ) from None
    return ray


@contextlib.contextmanager
def emulated_cluster(nodes: int = 2, cpus: int = 1) -> Iterator[Any]:
    """Start an emulated cluster, connect this process to it, and stop it at the end of the block.

    It listens on 127.0.0.1 only, has no dashboard, and uses a temporary folder. Yields Ray's
    ``Cluster``.

    Args:
        nodes: number of nodes besides the head, which does no work.
        cpus: cores that each node reports.

    Raises:
        ClusterError: Ray is not installed or does not start, or this process is already connected
            to a cluster.
    """
    with _local_environment():
        ray = import_ray()  # reads some of the variables
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        if ray.is_initialized():
            raise ClusterError("this process is connected to a Ray cluster: call ray.shutdown()")
        # Has the effect of RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER even if Ray was imported before.
        enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        try:
            try:
                cluster = _start(Cluster, nodes, cpus)
            except ClusterError:
                # Ray forks while threads of its own run: rarely, a new process hangs at its start.
                cluster = _start(Cluster, nodes, cpus)
            try:
                with connected_to(ray, cluster.address, _node_ip_address="127.0.0.1"):
                    yield cluster
            finally:
                cluster.shutdown()
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = enabled


def _start(cluster_of: type, nodes: int, cpus: int) -> Any:
    node = {"node_ip_address": "127.0.0.1", "object_store_memory": 150_000_000}  # bytes
    cluster = cluster_of()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False, **node)
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, **node)
    except BaseException as error:
        said = _last_words()  # before the shutdown, of which Ray's servers write as well
        try:
            cluster.shutdown()
        finally:
            _end_all()
        if isinstance(error, Exception):  # Ray has no class of its own for a failed start
            raise ClusterError("\n".join([f"Ray does not start: {error}", *said])) from error
        raise
    return cluster


@contextlib.contextmanager
def _local_environment() -> Iterator[None]:
    """Set environment variables that keep Ray local; no other settings reach all its processes."""
    # In /tmp, since the folder will hold sockets, whose paths must be short.
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    os.mkdir(Path(home) / "ray")
    local = {
        "RAY_TMPDIR": home,
        # Makes Ray use 127.0.0.1 as this machine's address, as on a Mac.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_TOKEN_PATH": str(Path(home) / "token"),
        "RAY_worker_niceness": "0",  # the default gives every other process precedence
        # By default, a node with few cores starts new workers for each task.
        "RAY_num_workers_soft_limit": "8",
        # Without it, Ray reports every dead process at length; here they are killed on purpose.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
        # How long the other workers wait for one that was killed during training.
        "JAX_DISTRIBUTED_SHUTDOWN_TIMEOUT_S": "2",
    }
    before = {name: os.environ[name] for name in local if name in os.environ}
    os.environ.update(local)
    try:
        yield
    finally:
        shutil.rmtree(home, ignore_errors=True)
        for name in local:
            os.environ.pop(name, None)
        os.environ.update(before)


def busy_processes(kind: str) -> list[int]:
    """List the process ids of an emulated cluster's actors; none but on Linux.

    Args:
        kind: Ray's name of the actor: "RayTrainWorker" trains, "MapWorker" embeds.
    """
    return [pid for pid, title in _processes() if title.startswith(f"ray::{kind}".encode())]


def _processes() -> list[tuple[int, bytes]]:
    """The ids and command lines of all processes that were started with this cluster's RAY_TMPDIR.

    That is all of Ray's own and what this process started meanwhile; none but on Linux.
    """
    found, home = [], f"RAY_TMPDIR={os.environ.get('RAY_TMPDIR')}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            title, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            if home in variables and int(path.name) != os.getpid():
                found.append((int(path.name), title))
    return found


def _end_all() -> None:
    """Kill what a failed start has left: Ray keeps no record of a node that failed to start."""
    deadline = time.monotonic() + 10
    while (left := _processes()) and time.monotonic() < deadline:
        for pid, _ in left:  # which may have started others since
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _last_words() -> list[str]:
    """The last lines of the logs of Ray's servers, each after the name of its file."""
    lines = []
    for log in sorted((Path(os.environ["RAY_TMPDIR"]) / "ray/session_latest/logs").glob("*.[eo]*")):
        if log.name.startswith(("gcs_server", "raylet")):  # of each node: raylet.1.err, ...
            text = log.read_text(errors="replace").splitlines()
            said = [line for line in text if line[:1].strip()]  # no tables, which are indented
            lines += [f"{log.name}: {line}" for line in said[-3:]]
    return lines


@contextlib.contextmanager
def connected_to(ray, address: str, **options: Any) -> Iterator[None]:
    """Connect this process to a cluster, quietly; ``options`` are those of ``ray.init``."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
