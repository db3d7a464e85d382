"""What was decided for a call, kept for the next one that is like it.

Checking a call takes several times as long as launching it. Every call is launched by a plan. Those
of calls on a GPU are kept: a later call whose tensors have the same shapes, strides, dtypes and
devices, and whose options are the same, needs no check again. Only what may differ between the two
is looked at: addresses, gradients, and whether torch is tracing or a simulated device is entered.

Of each set of options and each shape of k, the plans that were used last are tried first, by guards
of torch's compiler (``guards``); behind them stand all plans by a key that is made in Python.
"""

from __future__ import annotations

import contextlib
import marshal
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from sys import modules
from types import NoneType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

# Looked up once: a call has a few microseconds for everything.
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _len_torch_function_stack as function_modes
from torch._C._functorch import peek_interpreter_stack as functorch_transforms
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from cute_fa.errors import CuteFAError, LaunchError, MissingToolError
from cute_fa.ops.guards import Guard, guard_of
from cute_fa.target import Target

MAX_PLANS = 4096
"""All are dropped beyond this many: a program with ever new shapes must not fill the memory."""

More = tuple[Tensor | None, ...]
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_UNALIGNED = 16 - 1  # bits of an address that ``checks.ALIGNMENT_BYTES`` wants clear
# What a plan is kept for; anything else that is legal is checked each time. Objects of these types
# are equal only if they mean the same. (Whatever has a buffer is marshalled as bytes.)
_NAMES = {NoneType, str, Target}
_NUMBERS = {NoneType, bool, int, float}
_MARSHAL_VERSION = 2  # the last without references, which make equal objects differ
_plans: dict[Hashable, Plan] = {}
_guards: dict[Plan, Guard | None] = {}
_recent: dict[Hashable, tuple[tuple[Guard, Plan], ...]] = {}  # the latest first
_RECENT = 4  # of each kind: trying one that does not fit costs 0.3 µs

latest = threading.local()
"""What the latest call of each thread launched on the simulator, if anything: ``launches``."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is known of a call but the tensors' addresses.

    Attributes:
        launch: takes the kernel's arguments.
        device: of the tensors, if it has to be torch's current one meanwhile.
        outputs: shape, strides and dtype of out, lse and what the kernel wants beside them.
        scalars: what follows these tensors among the arguments.
        convert: makes what follows the scalars of the call's tensors behind v; None if those do.
        last: what follows all that.
        prepare: what has to be done to the new outputs before the launch; None for nothing.
    """

    launch: Callable[..., Any]
    outputs: tuple[Layout, ...]
    scalars: tuple[Any, ...]
    device: torch.device | None = None
    convert: Callable[[More], More] | None = None
    last: tuple[Any, ...] = ()
    prepare: Callable[[Sequence[Tensor]], None] | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, more: More = ()) -> tuple[Tensor, Tensor]:
        """Allocate the results and launch, on torch's current stream of the tensors' device.

        Args:
            more: the call's tensors behind v, in the order of ``key_of``.

        Raises:
            LaunchError: CUDA refused.
            MissingToolError: an older torch hands out no FP8 tensors without an extension.
        """
        latest.launches = ()
        device = self.device
        if device is not None and torch._C._cuda_getDevice() != device.index:
            with torch.cuda.device(device):
                return self.run(q, k, v, more)
        empty = _empty_on_cpu if device is None else _empty_on_gpu
        made = list(starmap(empty, self.outputs))
        if self.prepare is not None:
            self.prepare(made)
        if self.convert is not None:
            more = self.convert(more)
        try:
            self.launch(q, k, v, *made, *self.scalars, *more, *self.last)
        except RuntimeError as error:
            refusal = _in_words(error)
            if refusal is None:
                raise
            raise refusal from error
        return made[0], made[1]


# As the DSL's runtime says what CUDA refused.
_CUDA_ERROR = re.compile(r"(?:CUDA Error Code: |cudaError)(\d+)")
# As torch 2.6 says it, whose tensors TVM-FFI hands on by way of Python if it could not compile the
# extension that it brings for such versions.
_NO_FP8 = "float8 types are not supported by dlpack"


def _in_words(error: RuntimeError) -> CuteFAError | None:
    """What a launch raised, with what CUDA means by its number; None for anything else."""
    if isinstance(error, CuteFAError):
        return None
    if _NO_FP8 in str(error):
        return MissingToolError(
            "this torch hands no FP8 tensors to compiled code by itself",
            got=f"torch {torch.__version__}: {_NO_FP8}",
            fix="pip install torch-c-dlpack-ext, or a newer torch (2.11 needs nothing)",
        )
    code = _CUDA_ERROR.search(str(error))
    if code is None:
        return None
    name = f"CUDA Error Code: {code[1]}"
    with contextlib.suppress(AttributeError, ValueError):  # a torch without CUDA, an unknown number
        name += f", {torch.cuda.CudaError(int(code[1]))}"
    return LaunchError(
        "CUDA did not launch the kernel",
        got=name,
        fix="an earlier kernel may have failed; CUDA_LAUNCH_BLOCKING=1 shows which one did",
    )


def _allocator(place: str) -> Callable[..., Tensor]:
    """Takes shape, strides and dtype of a tensor on "cpu", or on torch's current GPU ("cuda").

    What torch's compiled graphs allocate with, for half the time of ``torch.empty_strided``: no
    mode of torch gets to see it, which is why ``find`` has looked for them.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{place}", None)

    def empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=place)

    return quick or empty


_empty_on_cpu, _empty_on_gpu = _allocator("cpu"), _allocator("cuda")


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Layout:
    """The layout of a contiguous tensor."""
    return tuple(shape), torch.empty(shape, device="meta").stride(), dtype


def look_up(
    q: Any, k: Any, v: Any, more: tuple[Any, ...], numbers: tuple[Any, ...], names: tuple[Any, ...]
) -> tuple[Plan | None, Any]:
    """The plan of an earlier call that was like this one; or None, and what ``remember`` keeps the
    plan under that the checks will lead to.

    Args: as of ``key_of``.
    """
    tensors = [q, k, v]
    try:
        if q.is_nested or v.is_nested:
            return None, None  # ``Guard`` says why; k, if nested, has no shape
        before, pattern = None, 1
        for x in more:
            pattern <<= 2
            if x is None:
                pattern += 1
            elif x is before:  # as where sequences of queries and of keys end alike
                pattern += 2
            elif x.is_nested:
                return None, None
            else:
                tensors.append(x)
                before = x
        kind = (k.shape, pattern, names, marshal.dumps(numbers, _MARSHAL_VERSION))
        for guard, plan in _recent.get(kind, ()):
            if guard(*tensors):  # which no tensor of another type passes
                if _is_watched() or (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _UNALIGNED:
                    return None, None
                return plan, None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None  # no dense tensor; an option such as a list; or a number that is none
    key = key_of(q, k, v, more, numbers, names)
    found = find(key, q, k, v)
    if found is not None:
        _put_first(kind, found, tensors)
    return found, key


def key_of(
    q: Any, k: Any, v: Any, more: tuple[Any, ...], numbers: tuple[Any, ...], names: tuple[Any, ...]
) -> Any:
    """What a call is recognised by; None for one that must be checked.

    Args:
        more: the call's tensors behind v, None for one that is left out: for packed sequences
            cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k; then the three descales if any of them
            is given.
        numbers: all that is a number, a flag, or a pair of them.
        names: all else that decides what is launched.
    """
    if not type(q) is type(k) is type(v) is Tensor:
        return None
    kinds: list[Hashable] = []
    try:
        for x in more:
            if type(x) is Tensor:
                wants_gradient = x.requires_grad and is_grad_enabled()
                kinds.append((x.shape, x.stride(), x.dtype, x.device, x.is_neg(), wants_gradient))
            elif x is None:
                kinds.append(None)
            else:
                return None
        return (
            (q.shape, k.shape, v.shape),
            (q.stride(), k.stride(), v.stride()),
            (q.dtype, k.dtype, v.dtype),
            (q.device, k.device, v.device),
            q.is_neg() or k.is_neg() or v.is_neg(),
            tuple(kinds),
            names,
            # Equal for equal numbers of the same types: True is equal to 1 and to 1.0, but only one
            # of them is a legal value.
            marshal.dumps(numbers, _MARSHAL_VERSION),
        )
    except (RuntimeError, TypeError, ValueError):
        return None  # a nested tensor, which has no strides; or a number that is none


def find(key: Any, q: Tensor, k: Tensor, v: Tensor) -> Plan | None:
    """The plan of an earlier call of this key, if nothing else stands against it now."""
    try:
        plan = _plans.get(key)
    except TypeError:
        return None  # an option that cannot be hashed, such as a list
    if plan is None or _is_watched():
        return None
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _UNALIGNED:
        return None
    if (q.requires_grad or k.requires_grad or v.requires_grad) and is_grad_enabled():
        return None
    return plan


def _is_watched() -> bool:
    """Whether a mode of torch (fake tensors, vmap, a function mode, forward derivatives) looks at
    what is called, or a simulated device is entered."""
    if dispatch_modes() or functorch_transforms() or (function_modes() and _is_listened_to()):
        return True
    hosts = modules.get("cute_fa.sim.hosts")
    return forward_ad._current_level >= 0 or (hosts is not None and hosts.is_entered())


def _is_listened_to() -> bool:
    """Whether one of torch's function modes does more than say where new tensors belong, as
    ``torch.set_default_device`` does; a launch makes none that could belong elsewhere."""
    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _put_first(kind: Hashable, plan: Plan, tensors: Sequence[Tensor]) -> None:
    """Have a plan that was found by its key found by a guard, if tensors like these come again."""
    guard = _guards.get(plan)
    # Tensors of one key may differ for torch, as those do that were made in inference mode.
    if guard is None or not guard(*tensors):
        guard = _guards[plan] = guard_of(tensors)
    if guard is not None:
        others = [entry for entry in _recent.get(kind, ()) if entry[1] is not plan]
        _recent[kind] = ((guard, plan), *others[: _RECENT - 1])


def remember(key: Any, plan: Plan) -> None:
    """Keep a plan for the calls that have this key."""
    if key is None:
        return
    *_, names, numbers = key
    if not (_NAMES.issuperset(map(type, names)) and _NUMBERS.issuperset(_types(numbers))):
        return
    if len(_plans) >= MAX_PLANS:
        forget()
    try:
        _plans[key] = plan
    except TypeError:
        return


def _types(numbers: bytes) -> Iterator[type]:
    for number in marshal.loads(numbers):
        yield from map(type, number if isinstance(number, (tuple, list)) else (number,))


def forget() -> None:
    """Drop all plans: kernels may come from elsewhere now."""
    for each in (_plans, _guards, _recent):
        each.clear()
