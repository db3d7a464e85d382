"""Compile many kernels at once, in worker processes.

The DSL cannot compile in two threads, so each worker is a fresh interpreter that takes requests
as JSON lines on stdin and answers on stdout; artefacts travel through the cache directory. The
caller's ``__main__`` is not imported again, and a worker that crashes costs one request.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal, overload

from cute_fa import env
from cute_fa.build.cache import KernelCache
from cute_fa.build.compile import Request, compile_into, lookup, make_request
from cute_fa.build.compiled import Compiled
from cute_fa.build.registry import KernelEntry
from cute_fa.errors import CompileError, CuteFAError, InvalidArgumentError, InvalidTypeError
from cute_fa.problem import KernelVariant
from cute_fa.target import get_target

# progress(done, total, label of the kernel that is done)
Progress = Callable[[int, int, str], None]

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from cute_fa.build.parallel import work; work()"
)


@overload
def compile_many(
    specs: Iterable[Mapping[str, Any] | Request],
    *,
    jobs: int | None = ...,
    progress: Progress | None = ...,
    return_errors: Literal[False] = ...,
) -> list[Compiled]: ...
@overload
def compile_many(
    specs: Iterable[Mapping[str, Any] | Request],
    *,
    jobs: int | None = ...,
    progress: Progress | None = ...,
    return_errors: Literal[True],
) -> list[Compiled | CuteFAError]: ...
def compile_many(
    specs: Iterable[Mapping[str, Any] | Request],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    return_errors: bool = False,
) -> list[Compiled] | list[Compiled | CuteFAError]:
    """Compile many kernels, ``jobs`` at a time; those on disk cost no process.

    Args:
        specs: arguments of ``compile`` as mappings (``generation`` and ``direction`` optional).
        jobs: worker processes; by default one per core, or none if this process does a single
            compile as well. 1 compiles in this process.
        progress: called with (done, total, label) after each kernel, on the calling thread.
        return_errors: put the error of a failed compile into the list instead of raising it.

    Returns:
        One Compiled per spec, in order.

    Raises:
        CuteFAError: a spec is not valid; or, once all others are done, the first that failed.
    """
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise InvalidArgumentError(
            "jobs is not usable",
            got=repr(jobs),
            expected="an integer ≥ 1",
            fix="leave it out for one process per core",
        )
    requests = [spec if isinstance(spec, Request) else _request(spec) for spec in specs]
    results: list[Compiled | CuteFAError | None] = [None] * len(requests)
    report = progress or (lambda done, total, label: None)
    with contextlib.ExitStack() as stack:
        if env.cache_enabled():
            store = KernelCache()
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cute_fa-"))
            store = KernelCache(Path(folder, "kernels"))
        done = 0
        misses = []
        for index, request in enumerate(requests):
            results[index] = lookup(request, store)
            if results[index] is None:
                misses.append(index)
            else:
                done += 1
                report(done, len(requests), request.label)
        for index, result in _run_all(requests, misses, jobs, store):
            results[index] = result
            done += 1
            report(done, len(requests), requests[index].label)
    errors = [result for result in results if isinstance(result, CuteFAError)]
    if errors and not return_errors:
        raise errors[0]
    return results  # type: ignore[return-value]


def _request(spec: Mapping[str, Any]) -> Request:
    arguments = dict(spec)
    if "use_cache" in arguments:
        raise InvalidArgumentError(
            "use_cache is not part of a spec", fix="set CUTE_FA_CACHE=0 to compile without a cache"
        )
    return make_request(
        arguments.pop("generation", "auto"), arguments.pop("direction", "fwd"), **arguments
    )


def _run_all(
    requests: list[Request], indices: list[int], jobs: int | None, store: KernelCache
) -> Iterable[tuple[int, Compiled | CuteFAError]]:
    """(index, result) of each request as it is done."""
    count = min(jobs or len(os.sched_getaffinity(0)), len(indices))
    # A worker starts without torch, which is quicker unless it is loaded here anyway.
    if jobs == 1 or (count <= 1 and "torch" in sys.modules):
        for index in indices:
            yield index, _in_process(requests[index], store)
        return
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in indices:
        todo.put(index)
    finished: queue.SimpleQueue[tuple[int, Compiled | CuteFAError]] = queue.SimpleQueue()

    def serve() -> None:
        with _Worker(store.root) as worker, contextlib.suppress(queue.Empty):
            while True:
                index = todo.get_nowait()
                finished.put((index, _ask(worker, requests[index], store)))

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in indices:
        yield finished.get()
    for thread in threads:
        thread.join()


def _in_process(request: Request, store: KernelCache) -> Compiled | CuteFAError:
    try:
        return compile_into(request, store)
    except CuteFAError as error:
        return error


def _ask(worker: _Worker, request: Request, store: KernelCache) -> Compiled | CuteFAError:
    try:
        worker.compile(request)
        found = lookup(request, store)
    except CuteFAError as error:
        return error
    except Exception as error:
        # The caller counts on one answer per request: nothing may be lost in a thread.
        return CompileError(f"compiling {request.label} failed: {type(error).__name__}", got=error)
    if found is None:
        return CompileError(
            f"compiling {request.label} left nothing usable in the cache", got=str(store.root)
        )
    return found


class _Worker:
    """A child interpreter that compiles one request at a time; started again if it dies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._child: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._log.close()

    def compile(self, request: Request) -> None:
        """Compile into ``root``.

        Raises:
            CuteFAError: what the worker answered, or how it died.
        """
        child = self._running()
        line = json.dumps({**to_json(request), "root": str(self.root)})
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise self._died(request)
        problem = json.loads(answer)["error"]
        if problem:
            raise CompileError(problem)

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                # Part of tvm_ffi that wants torch; see work().
                env=env.child_environment(TVM_FFI_DISABLE_TORCH_C_DLPACK="1"),
            )
        return self._child

    def _died(self, request: Request) -> CompileError:
        assert self._child is not None
        code = self._child.wait()
        self._child = None
        self._log.seek(0)
        tail = self._log.read()[-2000:].strip()
        return CompileError(
            f"the process that compiled {request.label} died",
            got=f"exit code {code}" + (f", after printing:\n{tail}" if tail else ""),
        )

    def _stop(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None and self._child.stdout is not None
            self._child.stdin.close()
            self._child.wait()
            self._child.stdout.close()
            self._child = None


def to_json(request: Request) -> dict[str, Any]:
    """A request as JSON values; ``from_json`` is the inverse up to lists for tuples."""
    document = {
        "entry": asdict(request.entry),
        "variant": asdict(request.variant),
        "arch": request.target.arch,
        "overrides": dict(request.overrides),
        "line_info": request.line_info,
        "key": request.key,
    }
    try:
        return json.loads(json.dumps(document))
    except TypeError as error:
        raise InvalidTypeError(
            "a config field cannot be sent to a worker process",
            got=str(error),
            fix="compile it with jobs=1",
        ) from error


def from_json(document: Mapping[str, Any]) -> Request:
    entry: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in document["entry"].items()
    }
    return Request(
        KernelEntry(**entry),
        KernelVariant(**document["variant"]),
        get_target(document["arch"]),
        document["overrides"],
        document["line_info"],
    )


def work() -> None:
    """A worker's loop; runs in the child process until its stdin closes."""
    # tvm_ffi imports torch if it can, against a conflict of symbols on Windows: seconds that a
    # compile does not need. None in its place means "not installed".
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    answers = os.fdopen(os.dup(1), "w")
    # What the DSL and ptxas print must not mix with the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        document = json.loads(line)
        print(json.dumps({"error": _work_one(document)}), file=answers, flush=True)


def _work_one(document: Mapping[str, Any]) -> str | None:
    request = from_json(document)
    try:
        if request.key != document["key"]:
            return f"the sources of {request.label} changed while kernels were being compiled"
        compile_into(request, KernelCache(Path(document["root"])))
    except CuteFAError as error:
        return str(error)
    except Exception as error:
        return str(CompileError(f"compiling {request.label} failed", got=repr(error)))
    return None
