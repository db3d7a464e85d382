"""Compile one kernel for any architecture, on any machine; no GPU is asked.

``compile`` looks in this process, then on disk, and only then loads the DSL. What comes back is
verified: the DSL can hand out a path instead of an artefact, or another thread's architecture,
without an error.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cute_fa import env
from cute_fa.build import keys
from cute_fa.build.cache import KernelCache
from cute_fa.build.compiled import Compiled, label
from cute_fa.build.host import HOST_NAME
from cute_fa.build.registry import KernelEntry, choose_generation, find, load
from cute_fa.build.toolchain import check_loaded_flavour, toolchain
from cute_fa.errors import CompileError, CuteFAError, InvalidArgumentError, InvalidTypeError
from cute_fa.problem import (
    DTYPE_BYTES,
    KERNEL_DTYPES,
    AttentionProblem,
    KernelVariant,
    check_flag,
    check_integer,
    normalise_window,
)
from cute_fa.target import Target, get_target
from cute_fa.varlen import VarlenProblem

_MEMO: dict[tuple[str, str], Compiled] = {}

_DTYPE_ALIASES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
}
# Beside the kernel's own sources, what decides what an artefact holds.
_DECISIVE = ("cute_fa.build.compile",)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PTX_VERSION = re.compile(r"^\.version\s+\d+\.\d+", re.MULTILINE)
_PTX_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_PTX_ENTRY = re.compile(r"\.entry\s+([\w$]+)")


@dataclass(frozen=True)
class Request:
    """One kernel to compile, fully decided; everything its key depends on."""

    entry: KernelEntry
    variant: KernelVariant
    target: Target
    overrides: Mapping[str, Any] = field(default_factory=dict)
    line_info: bool = False

    @cached_property
    def config(self) -> Any:
        return self.entry.config(self.variant, self.target, self.overrides)

    @property
    def options(self) -> str:
        """What decides the DSL's output, beside the kernel and its config."""
        line_info = " --generate-line-info" if self.line_info else ""
        return f"--gpu-arch {self.target.arch} --enable-tvm-ffi{line_info}"

    @property
    def label(self) -> str:
        return label(self.entry.generation, self.entry.direction, self.target.arch, self.variant)

    @cached_property
    def key(self) -> str:
        return keys.digest(
            {
                "kernel": self.entry.kernel,
                "arguments": self.entry.arguments,
                "config": self.config,
                "arch": self.target.arch,
                "options": self.options,
                "host function": HOST_NAME,
                "dsl settings": env.dsl_settings(),
                "toolchain": toolchain().key_parts(),
                "sources": keys.source_digest((*self.entry.sources, *_DECISIVE)),
            }
        )


def compile(
    generation: str = "auto",
    direction: str = "fwd",
    *,
    arch: str | Target,
    dtype: Any,
    head_dim: int,
    head_dim_v: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    varlen: bool = False,
    seqused_q: bool = False,
    seqused_k: bool = False,
    packed_group: int = 1,
    block_descales: bool = False,
    line_info: bool = False,
    use_cache: bool = True,
    **config: Any,
) -> Compiled:
    """Compile a kernel, or take it from the cache.

    Batch, sequence lengths, head counts, strides, the window's bounds, softcap's value and the
    softmax scale are arguments of the compiled function: one compile serves them all.

    Args:
        generation: "fa1", "fa2", … or "auto", the newest that serves the problem on ``arch``.
        direction: "fwd".
        arch: e.g. "sm_80", "sm_90a", "hopper"; any of ``cute_fa.target.TARGETS``.
        dtype: a torch dtype or its name.
        head_dim, head_dim_v: D and Dv (D by default); multiples of 8 up to 256.
        causal: bottom-right aligned causal mask.
        window_size: (left, right); only whether each side is bounded matters here.
        softcap: only whether it is above 0 matters here.
        varlen: for packed sequences (T, H, D), as ``flash_attn_varlen_func`` takes them.
        seqused_q, seqused_k: whether such a call says how much of each sequence counts.
        packed_group: query heads of a K/V head that share row tiles.
        block_descales: whether every 128 rows of FP8 inputs have a descale of their own.
        line_info: relate PTX and SASS to source lines; compiles to another kernel.
        use_cache: False compiles anew and stores nothing.
        config: fields of the kernel's config to set, e.g. ``tile_n=64``.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that no kernel could take.
        UnsupportedError: the generation does not serve this on ``arch``.
        CompileError: the compiler failed or returned something else than was asked for.
        CacheError: the cache directory cannot be used.
    """
    check_flag("use_cache", use_cache)
    request = make_request(
        generation,
        direction,
        arch=arch,
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        varlen=varlen,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        packed_group=packed_group,
        block_descales=block_descales,
        line_info=line_info,
        **config,
    )
    return compile_request(request, use_cache=use_cache)


def make_request(generation: str, direction: str, **arguments: Any) -> Request:
    """Check the arguments of ``compile`` (all but ``use_cache``) and settle the kernel."""
    target = get_target(arguments.pop("arch"))
    line_info = arguments.pop("line_info", False)
    check_flag("line_info", line_info)
    group = check_integer("packed_group", arguments.pop("packed_group", 1))
    if group < 1:
        raise InvalidArgumentError(
            "packed_group is not positive",
            got=group,
            expected="how many query heads share row tiles",
            fix="packed_group=1: every query head gets row tiles of its own",
        )
    problem = _problem(arguments)
    if generation == "auto":
        generation = choose_generation(problem, target, direction=direction)
    entry = find(generation, direction)
    by_block = arguments.pop("block_descales", False)
    check_flag("block_descales", by_block)
    variant = replace(problem.variant, packed_group=group, has_block_descales=by_block)
    request = Request(entry, variant, target, arguments, line_info)
    request.config  # noqa: B018  raises if the kernel does not serve the variant
    return request


def _problem(arguments: dict[str, Any]) -> AttentionProblem | VarlenProblem:
    """A one-token problem of the variant asked for; takes its arguments out of ``arguments``."""
    head_dim, head_dim_v = arguments.pop("head_dim"), arguments.pop("head_dim_v", None)
    causal = arguments.pop("causal", False)
    left, right = normalise_window(causal, arguments.pop("window_size", (-1, -1)))
    flags = {name: arguments.pop(name, False) for name in ("varlen", "seqused_q", "seqused_k")}
    for name, value in flags.items():
        check_flag(name, value)
    problem = AttentionProblem(
        batch=1,
        seqlen_q=1,
        seqlen_k=1,
        heads_q=1,
        heads_k=1,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        dtype=dtype_name(arguments.pop("dtype")),
        causal=causal,
        window_left=left,
        window_right=right,
        softcap=arguments.pop("softcap", 0.0),
    )
    if flags["varlen"]:
        return VarlenProblem(
            problem, 1, 1, has_seqused_q=flags["seqused_q"], has_seqused_k=flags["seqused_k"]
        )
    if flags["seqused_q"] or flags["seqused_k"]:
        raise InvalidArgumentError(
            "seqused belongs to packed sequences",
            got="seqused_q or seqused_k without varlen",
            expected="varlen=True with it",
            fix="pass varlen=True",
        )
    return problem


def dtype_name(dtype: Any) -> str:
    """ "float16", "bfloat16" or "float8_e4m3fn" from a torch dtype, its name or a short form."""
    name = str(dtype).removeprefix("torch.").lower()
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPE_BYTES:
        raise InvalidTypeError(
            "dtype is not an attention dtype",
            got=repr(dtype),
            expected=" or ".join(KERNEL_DTYPES),
            fix="compile for one of these; cute_fa.reference.dense.attention takes other dtypes",
        )
    return name


def compile_request(request: Request, *, use_cache: bool = True) -> Compiled:
    """The kernel of a request: from this process, the disk cache, or the compiler."""
    if not (use_cache and env.cache_enabled()):
        with _one_at_a_time():
            return _compiled(request, *_run_compiler(request), None)
    store = KernelCache()
    memo = (str(store.root), request.key)
    found = _MEMO.get(memo)
    if found is not None:
        return found
    return _MEMO.setdefault(memo, compile_into(request, store))


def compile_into(request: Request, store: KernelCache) -> Compiled:
    """The kernel of a request from ``store``, compiled into it if it is not there."""
    found = lookup(request, store)
    if found is not None:
        return found
    with _one_at_a_time(), store.lock(request.key):
        # Another thread or process may have finished it while we waited.
        found = lookup(request, store)
        if found is None:
            files, meta = _run_compiler(request)
            found = _compiled(request, files, meta, store.store(request.key, files, meta))
    return found


def lookup(request: Request, store: KernelCache) -> Compiled | None:
    """The request's kernel if the disk cache has it whole; never compiles, never loads the DSL."""
    hit = store.load(request.key)
    return None if hit is None else _compiled(request, *hit, store.path(request.key))


def _compiled(
    request: Request, files: Mapping[str, bytes], meta: Mapping[str, Any], directory: Path | None
) -> Compiled:
    return Compiled(
        generation=request.entry.generation,
        direction=request.entry.direction,
        arch=request.target.arch,
        variant=request.variant,
        config=request.config,
        kernel_name=meta["kernel_name"],
        ptx=files["kernel.ptx"].decode(),
        cubin=files["kernel.cubin"],
        options=meta["options"],
        key=request.key,
        toolchain=meta["toolchain"],
        host_object=files["host.o"],
        directory=directory,
    )


def _one_at_a_time() -> AbstractContextManager[Any]:
    """The lock of whoever compiles in this process; processes compile side by side.

    The DSL is a singleton that keeps the options of the compile in progress on itself: two
    threads get each other's architecture, silently.
    """
    from cute_fa.sim.hosts import compile_lock

    return compile_lock


def _run_compiler(request: Request) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Compile: (files by name, meta). Call it inside ``_one_at_a_time()``."""
    import cutlass.cute as cute

    check_loaded_flavour(toolchain().flavour)
    kernel_class, fake_arguments = load(request.entry.kernel), load(request.entry.arguments)
    with tempfile.TemporaryDirectory(prefix="cute_fa-") as folder:
        try:
            kernel, arguments = kernel_class(request.config), fake_arguments(request.config)
            # A dump directory of its own: file names carry no options and would be reused.
            dump = f"--keep-ptx --keep-cubin --dump-dir '{folder}'"
            host = cute.compile(
                kernel, *arguments, options=f"{request.options} {dump}", no_jit_engine=True
            )
            path = Path(folder, "host.o")
            host.export_to_c(str(path), function_name=HOST_NAME, export_only_tvm_ffi_symbols=True)
            ptx, cubin = host.artifacts.PTX, host.artifacts.CUBIN
            host_object = path.read_bytes()
        except CuteFAError:
            raise
        except Exception as error:
            raise _compile_error(request, error) from error
    name = _verify(request, ptx, cubin)
    files = {"kernel.ptx": ptx.encode(), "kernel.cubin": cubin, "host.o": host_object}
    meta = {
        "label": request.label,
        "kernel_name": name,
        "arch": request.target.arch,
        "options": request.options,
        "config": keys.plain(asdict(request.config)),
        "toolchain": toolchain().key_parts(),
    }
    return files, meta


def _verify(request: Request, ptx: object, cubin: object) -> str:
    """Check that the artefacts are what was asked for; the kernel's symbol.

    Raises:
        CompileError: they are missing, a path, or for another architecture.
    """
    arch = request.target.arch
    if not isinstance(ptx, str) or not _PTX_VERSION.search(ptx):
        raise _bad_artefact(request, "no PTX", ptx, "PTX text with a .version line")
    targets = _PTX_TARGET.findall(ptx)
    if targets != [arch]:
        raise _bad_artefact(request, "PTX for another target", targets, f".target {arch}")
    names = _PTX_ENTRY.findall(ptx)
    if not names:
        raise _bad_artefact(request, "PTX without a kernel", names, "an .entry")
    if not isinstance(cubin, bytes) or not cubin.startswith(b"\x7fELF"):
        raise _bad_artefact(request, "no cubin", cubin, "ELF bytes")
    return names[0]


def _bad_artefact(request: Request, what: str, got: object, expected: str) -> CompileError:
    settings = env.dsl_settings()
    return CompileError(
        f"compiling {request.label} gave {what}",
        got=repr(got)[:200],
        expected=expected,
        fix=f"the DSL was told {settings}: unset these" if settings else None,
    )


def _compile_error(request: Request, error: Exception) -> CompileError:
    message = _ANSI.sub("", str(error)).strip()
    return CompileError(
        f"compiling {request.label} failed: {type(error).__name__}",
        got=message.replace("\n", "\n            "),
        expected=f"PTX for {request.options} from {request.config}",
    )
