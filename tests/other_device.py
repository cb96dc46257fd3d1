"""A device that computes on the CPU and refuses what a GPU refuses: operations on tensors of two devices, and
tensors of its own as arrays. What would wait for a GPU warns, if torch.cuda.set_sync_debug_mode says so.

    from tests import other_device       # first: it changes torch in this process
    with other_device.Device():
        ...                              # the project's code takes the way of CUDA, with device "cudax"

It is a backend in Python (``torch.utils.backend_registration``): tensors of a subclass that wrap one on the
CPU. It knows as much of torch as this project uses."""

import warnings

import safetensors.torch
import torch
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lib import device

NAME = "cudax"
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal.default")
PLACES = ("aten.index.", "aten.index_put", "aten._unsafe_index.")  # operations that take indices
aten = torch.ops.aten
told = {"mode": "default"}


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())


class There(torch.Tensor):
    """A tensor of the device; ``here`` has its numbers."""

    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, here):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=torch.device(NAME, 0))
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"There({self.here!r})"

    def tolist(self):
        wait("tolist")
        return self.here.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor of a device is no array: copy it to the CPU first")


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def here(x):
    return x.here if isinstance(x, There) else x


def there(x):
    """``x`` on the device; sparse tensors cannot be wrapped, and are taken for the device's."""
    return There(x) if isinstance(x, torch.Tensor) and x.layout is torch.strided else x


def wait(what: str) -> None:
    if told["mode"] != "default":
        warnings.warn(f"synchronizing: {what}", stacklevel=3)


def run(func, args: tuple, kwargs: dict):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    own = {id(x.here): x for x in tensors if isinstance(x, There)}
    away = bool(own) or any(x.layout is not torch.strided for x in tensors)
    wanted, name = kwargs.get("device"), str(func)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    if func is aten.copy_.default:
        func(*tree_map(here, args))
        return args[0]
    if wanted is not None:
        away = torch.device(wanted).type == NAME
        kwargs["device"] = "cpu"
    elif away and (strangers := [x for x in tensors if not isinstance(x, There) and x.dim()]):
        if name.startswith(PLACES) and isinstance(args[0], There):
            wait(f"{name} with indices of the CPU")
        elif all(x.layout is torch.strided for x in strangers):
            raise RuntimeError(f"{name}: tensors of two devices, {[tuple(x.shape) for x in tensors]}")
    masks = isinstance(args[1], list | tuple) if len(args) > 1 and name.startswith("aten.index") else False
    by_mask = masks and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])
    if own and (by_mask or any(word in name for word in WAITS)):
        wait(name)
    out = func(*tree_map(here, args), **tree_map(here, kwargs))
    # what an operation changed in place stays the tensor that it was
    return tree_map(lambda x: own[id(x)] if id(x) in own else there(x), out) if away else out


def _copy(source, target, non_blocking=False):
    here(target).copy_(here(source))
    return target


# what C++ asks of a backend where no mode is entered, as in the backward pass
_library = torch.library.Library("aten", "IMPL")
_library.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: There(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
_library.impl(
    "empty.memory_format", lambda size, dtype=None, **_: There(torch.empty(size, dtype=dtype)), "PrivateUse1"
)
_library.impl("_copy_from", _copy, "PrivateUse1")
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)


def _on_host(write):
    return lambda what, *args, **options: write(tree_map(here, what), *args, **options)


class _Event:
    def record(self):
        pass

    def synchronize(self):
        pass


_device_constructors()  # with torch.device("meta"): looks for torch's own function
_empty = torch.empty
torch.empty = lambda *size, pin_memory=False, **options: _empty(*size, **options)
torch.save, safetensors.torch.save_file = _on_host(torch.save), _on_host(safetensors.torch.save_file)
torch.cuda.Event = _Event
torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.max_memory_allocated = lambda: 0
torch.cuda.mem_get_info = lambda *_: (10**12, 10**12)
torch.cuda.set_sync_debug_mode = lambda mode: told.update(mode=mode)
device.the_device = lambda wanted=None: str(wanted or NAME)
