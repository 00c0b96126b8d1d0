"""Engine for a Ray cluster: each worker is an actor with a network of its own.

A cluster started here listens on loopback, has no dashboard, and accepts commands only with a token of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import torch

from spade_fast._util.errors import ClusterError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast.batch.job import Job, not_sendable
from spade_fast.batch.schedule import POLL, WorkerDied
from spade_fast.batch.worker import DeviceError, Outcome, Worker
from spade_fast.inputs.networks import LoadedModel
from spade_fast.ops.memory import keep_freed_memory

_LOOPBACK = "127.0.0.1"
# If this is 0 when Ray is imported, a cluster that Ray starts is limited to this machine; also on Linux.
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_REACH = 5.0  # seconds within which a cluster must answer
_OBJECT_STORE = 100 * 2**20  # bytes; results are files, so it holds little more than the job


class RayCluster:
    """The cluster that this process is connected to."""

    def __init__(self) -> None:
        self._node = _connect_to_node()

    def close(self) -> None:
        """Close the connection to the node; the process stays connected to the cluster."""
        if self._node is not None:
            self._node.close()

    def count_workers(self, job: Job, model: LoadedModel, asked: int | None) -> int:
        """Return how many workers to start; those that do not fit wait. ValueError if no node has room for one."""
        import ray

        if asked == 0:
            raise InvalidValueError("engine 'ray' needs at least 1 worker, got 0")
        if torch.device(job.facts["device"]).index is not None:
            raise InvalidValueError(
                f"with engine 'ray' device must be 'cuda', which Ray numbers, got {job.facts['device']!r}"
            )

        threads, gpus = job.facts["threads"], _gpus(job)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        rooms = [int(node.get("CPU", 0)) // threads for node in nodes]
        if gpus:
            rooms = [min(room, int(node.get("GPU", 0))) for room, node in zip(rooms, nodes, strict=True)]
        if sum(rooms) == 0:
            raise InvalidValueError(
                f"no node of the cluster has {threads} processors{' and a GPU' * gpus} for a worker"
            )
        return sum(rooms) if asked is None else asked

    def free_bytes(self, job: Job) -> int:
        """Return the main memory of all nodes together; Ray does not know the memory of GPUs."""
        import ray

        return int(ray.cluster_resources().get("memory", 0))

    def team(self, job: Job, model: LoadedModel, workers: int, samples_per_solve: int) -> Actors:
        return Actors(job, samples_per_solve, self._node)


@contextmanager
def connected(address: str | None) -> Iterator[RayCluster]:
    """Connect to a cluster; None: the one this process is connected to, or else one that is started for the block.

    Raises
    ------
    ImportError
        Ray is missing.
    ValueError
        The address is not HOST:PORT or ``"auto"``, Ray would replace it by another, or this process is connected to
        another cluster.
    ConnectionError
        No cluster answers at the address, or one could not be started on loopback.
    """
    if address is not None and not _is_connected():
        _check_address(address)
    local = {"RAY_USAGE_STATS_ENABLED": "0", _CLUSTERS: "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    starts = address is None and not _is_connected()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
    try:
        with _environment(token if starts and "RAY_AUTH_MODE" not in os.environ else {}):
            if starts:
                _read_token_again()
            with _connected(address, local if address is None else {}) as cluster:
                yield cluster
    finally:
        if starts:
            _read_token_again()


@contextmanager
def _connected(address: str | None, environment: dict[str, str]) -> Iterator[RayCluster]:
    with _environment(environment):
        with extra_for("engine 'ray' needs"):
            import ray
        if ray.is_initialized():
            own = ray.get_runtime_context().gcs_address
            if address not in (None, "auto") and _resolved(address) != _resolved(own):
                raise InvalidValueError(
                    f"this process is connected to the Ray cluster at {own}, got address {address!r}"
                )
            with closing(RayCluster()) as cluster:
                yield cluster
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        else:
            if address == "auto":
                _check_found_address()
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:  # Ray prints the reason on stderr, but not the remedy
                raise ClusterError(f"{error}; if it has a token, set RAY_AUTH_MODE=token here too") from error
    try:
        if address is None and ray.util.get_node_ip_address() != _LOOPBACK:
            raise ClusterError(
                "Ray was imported earlier and would listen beyond loopback: import it later, "
                f"set {_CLUSTERS}=0, or call ray.init yourself"
            )
        with closing(RayCluster()) as cluster:
            yield cluster
    except SystemExit:
        signal.alarm(0)  # after SIGTERM, Ray has set one that would abort the process during the cleanup
        raise
    finally:
        ray.shutdown()


def _read_token_again() -> None:
    """Let Ray, if it is imported, read the token from the environment again: it remembers that of another cluster."""
    raylet: Any = sys.modules.get("ray._raylet")
    with suppress(AttributeError):  # not part of Ray's interface
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _connect_to_node() -> socket.socket | None:
    """Connect to Ray's process on this machine, the raylet; the connection is closed when it dies."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        import ray

        node: Any = ray._private.worker._global_node
        connection.connect(node.raylet_socket_name)
    except (ImportError, AttributeError, TypeError, OSError):  # not part of Ray's interface
        connection.close()
        return None
    return connection


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _resolved(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return host, port


def _check_address(address: str) -> None:
    """Check that a cluster can be reached; if it cannot, Ray would end the whole process."""
    host = address.rpartition(":")[0]
    if address != "auto" and (not host or "://" in address):
        raise InvalidValueError(f"address must be HOST:PORT or 'auto', on a node of the cluster, got {address!r}")
    if host in (_LOOPBACK, "localhost") and os.environ.get(_CLUSTERS) != "0":
        raise InvalidValueError(
            f"Ray replaces {host} by this machine's external address: pass the one that `ray start` printed, or, "
            f"if the cluster was started with {_CLUSTERS}=0, set that here too"
        )
    if host:
        _check_reachable(address, address)


def _check_found_address() -> None:
    """Check that what ``"auto"`` stands for can be reached: Ray would try for minutes."""
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address("auto")
    except (OSError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}: {error}") from error
    if found is not None:
        where = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the last `ray start` on this machine"
        _check_reachable(found, f"{found}, the address from {where}")


def _check_reachable(address: str, name: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(f"there is no Ray cluster at {name}: {error}") from error


class Actors:
    """A team of actors of the cluster.

    Raises
    ------
    TypeError
        The samples cannot be sent to other processes.
    ConnectionError
        From `ready`: Ray's process on this machine has died. Ray itself would end this process, with status 1.
    """

    def __init__(self, job: Job, samples_per_solve: int, node: socket.socket | None) -> None:
        import ray

        self._node = node
        actor: Any = ray.remote(_Actor)
        self._actor = actor.options(num_cpus=job.facts["threads"], num_gpus=_gpus(job), scheduling_strategy="SPREAD")
        try:
            self._arguments = ray.put(job), samples_per_solve
        except TypeError as error:
            raise not_sendable(error.__cause__ or error) from error

    def start(self, number: int) -> _Member:
        return _Member(self._actor.remote(*self._arguments))

    def ready(self, members: Mapping[int, _Member]) -> list[int]:
        if self._node is not None and _is_closed(self._node):
            raise ClusterError("the Ray node of this process died (out of memory?): run the same command to resume")
        numbers = {member.outcomes: number for number, member in members.items() if not member.idle}
        return [numbers[outcomes] for outcomes in _ready(list(numbers))]

    def end(self, members: Sequence[_Member]) -> None:
        for member in members:
            member.kill()


class _Member:
    """An actor, as the driver sees it; `outcomes` is None while it is idle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.outcomes: Any = actor.begin.options(num_returns="streaming").remote()

    @property
    def idle(self) -> bool:
        return self.outcomes is None

    def give(self, task: Sequence[int]) -> None:
        self.outcomes = self._actor.run.options(num_returns="streaming").remote(task)

    def receive(self) -> Outcome | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(next(self.outcomes))
        except StopIteration:
            self.outcomes = None
            return None
        except RayTaskError as error:
            if not isinstance(error.cause, DeviceError):
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            how = str(error.cause)
        except RayError as error:
            how = " ".join(str(error).split())
        self.kill()
        raise WorkerDied(how)

    def kill(self) -> None:
        import ray

        with suppress(Exception):  # it may have died, or the cluster
            ray.kill(self._actor)


class _Actor:
    """A worker in a process that Ray started."""

    def __init__(self, job: Job, samples_per_solve: int) -> None:
        self._job, self._samples_per_solve = job, samples_per_solve
        self._memory = ExitStack()

    def begin(self) -> Iterator[Outcome]:
        """Load the network."""
        self._memory.enter_context(keep_freed_memory())  # until the process ends
        torch.set_num_threads(self._job.facts["threads"])
        self._worker = Worker(self._job, self._samples_per_solve)
        yield from ()

    def run(self, indices: Sequence[int]) -> Iterator[Outcome]:
        """Work on samples."""
        yield from self._worker.run(indices)


def _ready(generators: list[Any]) -> list[Any]:
    import ray

    if not generators:
        time.sleep(POLL)
        return []
    return ray.wait(generators, timeout=POLL, fetch_local=False)[0]


def _gpus(job: Job) -> int:
    return int(torch.device(job.facts["device"]).type == "cuda")


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
