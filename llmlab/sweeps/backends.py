"""Where a sweep's points run, by joblib: in this process, in processes or threads of this computer, on Dask or Ray."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool

from ..errors import LabError, UnknownName

BACKENDS = ("loky", "threading", "dask", "ray")
IDLE = 30           # seconds after which this computer's worker processes end, and give back what their models hold
WAIT = 60           # seconds for a Dask cluster's first worker; those that died are started again
RETRIES = 1         # how often Ray runs again what a worker died under; Dask's scheduler has its own (allowed-failures)


@dataclass(frozen=True)
class Backend:
    """One of BACKENDS with so many workers. `deaths`: what joblib raises where a worker died under its work."""

    name: str
    jobs: int
    settings: dict = field(default_factory=dict)
    deaths: tuple[type[BaseException], ...] = ()

    @property
    def apart(self) -> bool:
        """Whether points run in other processes."""
        return self.name != "threading" and (self.name != "loky" or self.jobs != 1)

    @property
    def cluster(self) -> bool:
        return self.name in ("dask", "ray")

    def arriving(self, call: Callable, arguments: Iterable[tuple], alone: bool = False) -> Iterator:
        """What `call(*one)` returns for each of the arguments, as it is done; they are taken as workers become free, or,
        `alone`, one at a time in their order."""
        with _cores(self):
            run = joblib.Parallel(self.jobs, return_as="generator_unordered", batch_size=1,
                                  pre_dispatch=1 if alone else "2 * n_jobs", **self.settings)
            outputs = run(joblib.delayed(call)(*one) for one in arguments)
            try:
                for one in outputs:  # noqa: UP028 - `yield from` would close it where its warning is seen
                    yield one
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    outputs.close()


def backend_of(name: str | None, jobs: int | None) -> Backend:
    """The backend of that name; None is this computer. Raises LabError where it is unknown, not installed, not connected."""
    if name is not None and name not in BACKENDS:
        raise UnknownName(f"backend is {str(name)!r:.40}; there are {', '.join(BACKENDS)}, and None for this computer")
    if jobs is not None and (not isinstance(jobs, Integral) or isinstance(jobs, bool) or jobs == 0):
        raise LabError(f"n_jobs is {jobs!r:.40}; it is a number of workers, or -1 for one a core")
    jobs = jobs if jobs is None else int(jobs)           # of numpy too
    if name == "dask":
        return _dask()
    if name == "ray":
        return _ray(jobs)
    usual = 1 if name is None else -1
    jobs = joblib.effective_n_jobs(usual if jobs is None else jobs)
    if name == "threading":
        return Backend("threading", jobs, {"backend": "threading"})
    return Backend("loky", jobs, {"backend": "loky", "idle_worker_timeout": IDLE} if jobs > 1 else {}, (BrokenProcessPool,))


class _Raising:
    """What joblib leaves out for clusters: a worker's death comes as an exception that is handed on, and must be raised."""

    def retrieve_result_callback(self, out):
        if isinstance(out, BaseException):
            raise out
        return super().retrieve_result_callback(out)


def _dask() -> Backend:
    try:
        import distributed
        from joblib._dask import DaskDistributedBackend
    except ImportError:
        raise _missing("Dask") from None
    try:
        client = distributed.get_client()
    except ValueError:
        raise LabError('backend="dask" needs a cluster: dask.distributed.Client("scheduler:8786"), or Client() for one on '
                       "this computer") from None

    class Dask(_Raising, DaskDistributedBackend):
        def submit(self, func, callback=None):
            """joblib is called back only for what went well, and would wait for ever for a task whose workers all died."""
            task = super().submit(func, callback)
            task.add_done_callback(lambda done: callback(done.exception()) if done.exception() is not None else None)
            return task

        def effective_n_jobs(self, n_jobs):
            """Of a single worker joblib makes this process; it was asked for that worker."""
            return max(2, super().effective_n_jobs(n_jobs))

    made = Dask(client=client, wait_for_workers_timeout=WAIT)
    return Backend("dask", -1, {"backend": made}, (distributed.scheduler.KilledWorker,))


def _ray(jobs: int | None) -> Backend:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import exceptions as errors
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError:
        raise _missing("Ray") from None
    if not ray.is_initialized():
        raise LabError('backend="ray" needs a cluster: ray.init(address="auto"), or ray.init() for one on this computer')

    class Ray(_Raising, RayBackend):
        supports_return_generator = True                 # joblib forbids it where a pool may outlive the results: not here

    made = Ray(ray_remote_args={"max_restarts": RETRIES, "max_task_retries": RETRIES})
    return Backend("ray", -1 if jobs is None else jobs, {"backend": made},
                   (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError))


def _missing(name: str) -> LabError:
    return LabError(f"{name} is not installed: pip install 'llmlab[cluster]'")


@contextmanager
def _cores(backend: Backend) -> Iterator[None]:
    """Threads share the cores: where torch is loaded, each gets its part. Processes are told as they start."""
    torch = sys.modules.get("torch") if backend.name == "threading" and backend.jobs > 1 else None
    before = torch and torch.get_num_threads()
    try:
        if torch:
            torch.set_num_threads(max(1, before // backend.jobs))
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
