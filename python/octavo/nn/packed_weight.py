# SPDX-License-Identifier: Apache-2.0
"""What `.weight` of a packed layer is: a tensor of known shape and dtype, with values once somebody asks for them.

Models read `layer.weight.dtype` and `.device` in every forward, and a float matrix for each such question would cost
more than the product. So the tensor has no memory. An operation that needs the values gets a dequantized copy, which is
gone after it; an operation that would write to the weight is refused, for what it wrote would be gone as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

# Functions that read memory without going through the dispatcher, where there is none.
_VALUES = {
    torch.Tensor.tolist,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.__dlpack__,
    torch.Tensor.share_memory_,
}
_ARRAYS: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}
_ADDRESSES = {
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor._typed_storage,
}
_WRITES = {torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_}


class PackedWeight(torch.Tensor):
    """The values that `read` returns, or a view of them, unless they are to be changed.

    form   a tensor on the meta device of the same shape, strides and dtype
    read   returns the values, a new tensor at each call
    """

    _is_hf_initialized = True  # transformers draws random numbers for what does not say so

    _form: torch.Tensor
    _read: Callable[[], torch.Tensor]
    _kept: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, form: torch.Tensor, read: Callable[[], torch.Tensor], device: torch.device
    ) -> PackedWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            form.shape,
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            device=device,
        )

    def __init__(self, form: torch.Tensor, read: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._form, self._read, self._kept = form, read, None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WRITES or _is_setting(func, args, kwargs):
            _refuse(getattr(func, "__name__", str(func)))
        if func in _ADDRESSES:  # an address must stay what it is for as long as this tensor lives
            args[0]._kept = args[0]._values() if args[0]._kept is None else args[0]._kept
            return func(args[0]._kept, *args[1:], **kwargs)
        if func in _VALUES or func in _ARRAYS:
            result = func(args[0]._values(), *args[1:], **kwargs)
            if func in _ARRAYS:
                result.flags.writeable = False
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        parts = func.decompose(
            *args, **kwargs
        )  # in inference mode nobody else has done so: `to` may be a view or not
        if parts is not NotImplemented:
            return parts
        schema = func._schema
        given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                tree_map_only(PackedWeight, lambda _: _refuse(schema.name), given.get(argument.name))
        if _is_view(schema) and isinstance(args[0], PackedWeight):
            return _view(func, args[0], args[1:], kwargs)
        args, kwargs = tree_map_only(PackedWeight, lambda weight: weight._values(), (args, kwargs))
        return func(*args, **kwargs)

    def _values(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self._read()


def _is_view(schema: Any) -> bool:
    first = schema.arguments[0].alias_info if schema.arguments else None
    return first is not None and any(result.alias_info is not None for result in schema.returns)


def _view(func: Any, weight: PackedWeight, rest: tuple, kwargs: dict[str, Any]) -> Any:
    """A view, or several, that are computed and protected as the weight is."""
    form = func(weight._form, *rest, **kwargs)
    if isinstance(form, torch.Tensor):
        return PackedWeight(form, lambda: func(weight._values(), *rest, **kwargs), weight.device)
    return [
        PackedWeight(part, lambda i=i: func(weight._values(), *rest, **kwargs)[i], weight.device)  # type: ignore[misc]
        for i, part in enumerate(form)
    ]


def _is_setting(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `func` sets an attribute. To set requires_grad to False changes nothing: adapters do it."""
    is_setter = getattr(func, "__name__", "") == "__set__"
    if func is torch.Tensor.requires_grad_ or (is_setter and func.__self__ is torch.Tensor.requires_grad):
        return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    return is_setter


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"the weight of a quantized layer is read-only: {what} would change a dequantized copy and not the layer. "
        "Change the float model and quantize that, load int8 codes with load_state_dict, or make a new layer with "
        "QuantLinear.from_codes; weight.clone() is a float copy to work with"
    )
