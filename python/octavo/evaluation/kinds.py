# SPDX-License-Identifier: Apache-2.0
"""The four kinds of models: what a batch holds for each, which part of the output counts, and which kind a model is.

The kind is tried out, not guessed from names: a causal language model is one whose logits do not change when later
tokens do; an encoder gives hidden states or vectors of length 1. Where a batch could be read in two ways, the user is
asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KINDS = ("language_model", "classifier", "encoder", "module")
VECTORS = ("sentence_embedding", "last_hidden_state")  # outputs that mark an encoder, the better one first
ROWS_TRIED = 4  # of the first batch, to find out what kind a model is


@dataclass(frozen=True)
class Call:
    """One batch taken apart: what the model is called with, the right answers, and which positions count."""

    args: tuple
    kwargs: dict[str, Any]
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def windows(ids: torch.Tensor, length: int, batch: int) -> Iterator[torch.Tensor]:
    """Cuts running text into batches for a language model: each token but the first is predicted once.

    ids      int64 [tokens]
    returns  int64 [batch or fewer, length + 1], neighbours overlapping by one token; what is left over at the end of
             the text and does not fill a window is not used
    Raises: ValueError if the text is shorter than one window, or length or batch is below 1.
    """
    if length < 1 or batch < 1:
        raise ValueError(f"windows: length is {length} and batch {batch}, at least 1 is needed")
    count = (len(ids) - 1) // length
    if ids.dim() != 1 or count < 1:
        raise ValueError(f"windows: ids has shape {tuple(ids.shape)}, [{length + 1} or more] is needed")
    # as_strided rather than unfold: rows share the text's memory, and a batch is copied when it is used
    rows = ids.contiguous().as_strided((count, length + 1), (length, 1), ids.storage_offset())
    yield from rows.split(batch)


def take_apart(kind: str, args: tuple, kwargs: dict[str, Any]) -> Call:
    """What `kind` makes of a batch. Raises: TypeError, ValueError if the batch is not of that kind."""
    if kind == "language_model":
        return _language_call(args, kwargs)
    if kind == "classifier":
        return _classifier_call(args, kwargs)
    mask = kwargs.get("attention_mask") if kind == "encoder" else None
    return Call(args, kwargs, mask=None if mask is None else mask.bool())


def _language_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    ids = kwargs.get("input_ids") if kwargs else args[0] if len(args) == 1 else None
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] < 2:
        found = (
            f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else _described(args, kwargs)
        )
        raise ValueError(
            f"evaluate: a batch for a language model is int64 [batch, 2 or more], alone or as input_ids; got {found}"
        )
    if not kwargs:
        return Call((ids[:, :-1],), {}, ids[:, 1:])
    mask = kwargs.get("attention_mask")
    if mask is None:
        return Call((), {"input_ids": ids[:, :-1]}, ids[:, 1:])
    # A position counts if it is text and what it predicts is text: padding may be on either side.
    counts = mask[:, :-1].bool() & mask[:, 1:].bool()
    return Call((), {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}, ids[:, 1:], counts)


def _classifier_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    if kwargs:
        labels, rest = kwargs.get("labels"), {k: v for k, v in kwargs.items() if k != "labels"}
        return Call((), rest, None if labels is None else labels.long())
    if len(args) < 2:
        return Call(args, {})
    labels = args[-1]
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ValueError(
            f"evaluate: a batch for a classifier is (x, labels) with integer labels; got {_described(args, kwargs)}"
        )
    return Call(args[:-1], {}, labels.long())


def logits_of(output: Any) -> torch.Tensor:
    """The logits of an output: the tensor itself, `.logits`, or what a tuple starts with.

    Raises: TypeError if there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise TypeError(
            f"evaluate: the output is {type(output).__name__}; logits [..., classes] are needed: a tensor, an "
            "object with .logits, or a tuple that starts with them. kind='module' compares any tensors"
        )
    return found


def vectors_of(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The vectors of an encoder's output: the tensor itself, `sentence_embedding`, or `last_hidden_state` averaged
    over the tokens (of the mask).

    Raises: TypeError if there are none.
    """
    if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 1:
        return output
    names = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    name = next((name for name in VECTORS if names.get(name) is not None), None)
    if name is None:
        raise TypeError(
            f"evaluate: the output is {type(output).__name__}; an encoder gives a float tensor [batch, dim], "
            "sentence_embedding or last_hidden_state. kind='module' compares any tensors"
        )
    if name == "sentence_embedding":
        return names[name]
    hidden = names[name]
    weights = torch.ones(hidden.shape[:2]) if mask is None else mask
    weights = weights.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1)


def choose_kind(reference: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[str, str]:
    """The kind of a model and why, from what it does with its first batch.

    Raises: ValueError if the batch can be read in more than one way.
    """
    if "labels" in kwargs or (len(args) == 2 and _may_be_labels(args)):
        return _kind_with_labels(reference, args, kwargs)
    if len(args) > 1 and _takes_one_tensor(reference):
        raise ValueError(
            f"evaluate: a batch of {_described(args, kwargs)} is more than the model takes. A tuple is one batch: put "
            "batches into a list; if it ends with labels, say kind='classifier'"
        )
    ids: Any = kwargs.get("input_ids") if kwargs else args[0] if len(args) == 1 else None
    output = _tried(reference, args, kwargs, _is_ids(ids))
    if _is_ids(ids) and _looks_like_logits(output, ids[:ROWS_TRIED]):
        call = _language_call(args, kwargs)
        if is_causal(reference, call.args, call.kwargs):
            return "language_model", "it gives logits for each token that do not change with later tokens"
        return "module", "its logits for a token change with later tokens"
    if not isinstance(output, torch.Tensor) and not hasattr(output, "logits"):
        names = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        if any(names.get(name) is not None for name in VECTORS):
            return "encoder", "its output holds hidden states and no logits"
    elif isinstance(output, torch.Tensor) and output.dim() == 2 and output.is_floating_point():
        if ((output.double().norm(dim=-1) - 1).abs() < 1e-3).all():
            return "encoder", "its output is vectors of length 1"
    return "module", "nothing in its batches or output tells more"


def _tried(reference: nn.Module, args: tuple, kwargs: dict[str, Any], is_ids: bool) -> Any:
    args, kwargs = _some_rows(args), _some_rows(kwargs)
    try:
        return reference(*args, **kwargs)
    except Exception:
        if not is_ids:
            raise
    # A window for a language model is one token longer than what the model reads, which may be all it can read.
    call = _language_call(args, kwargs)
    return reference(*call.args, **call.kwargs)


def is_causal(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether logits stay what they are when all tokens of the second half of the window are others."""
    args, kwargs = _some_rows(args), _some_rows(kwargs)
    ids = kwargs["input_ids"] if kwargs else args[0]
    half = ids.shape[1] // 2
    before = logits_of(model(*args, **kwargs))
    changed = ids.clone()
    # Another token of the same batch: always one that the model knows.
    changed[:, half:] = torch.where(ids[:, half:] == ids.min(), ids.max(), ids.min())
    after = logits_of(model(**{**kwargs, "input_ids": changed}) if kwargs else model(changed))
    x, y = before[:, :half].double(), after[:, :half].double()
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    # A causal mask makes the difference exactly 0; 1e-5 of the largest logit leaves room for float32 rounding.
    return x.numel() == 0 or bool((x - y).abs().max() <= 1e-5 * x.abs().max())


def _kind_with_labels(reference: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[str, str]:
    call = _classifier_call(args, kwargs)
    if kwargs or _takes_one_tensor(reference):
        logits = logits_of(reference(*_some_rows(call.args), **_some_rows(call.kwargs)))
        labels = call.targets
        assert labels is not None  # both callers have seen them
        if logits.dim() == 2 and labels.dim() == 1 and 0 <= labels.min() and labels.max() < logits.shape[1]:
            return "classifier", "its batches hold one label for each row of logits"
    raise ValueError(
        f"evaluate: a batch of {_described(args, kwargs)} can be read in more than one way; say kind='classifier' "
        "if it ends with labels, kind='language_model' for token ids, kind='module' if all of it is the model's input"
    )


def _may_be_labels(args: tuple) -> bool:
    x, labels = args
    if not isinstance(x, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return False
    return labels.dim() == 1 and not labels.is_floating_point() and len(x.shape) > 0 and len(x) == len(labels)


def _takes_one_tensor(model: nn.Module) -> bool:
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    many = any(parameter.kind is kinds.VAR_POSITIONAL for parameter in parameters)
    return not many and sum(parameter.kind in positional for parameter in parameters) == 1


def _is_ids(ids: Any) -> bool:
    return isinstance(ids, torch.Tensor) and ids.dtype == torch.int64 and ids.dim() == 2 and ids.shape[1] > 2


def _looks_like_logits(output: Any, ids: torch.Tensor) -> bool:
    try:
        logits = logits_of(output)
    except TypeError:
        return False
    return (
        logits.dim() == 3
        and logits.shape[0] == len(ids)
        and ids.shape[1] - logits.shape[1] in (0, 1)
        and logits.shape[2] > int(ids.max())
    )


def _some_rows(inputs: Any) -> Any:
    """The first rows of every tensor, all that finding out takes."""
    if isinstance(inputs, tuple):
        return tuple(_some_rows(value) for value in inputs)
    if isinstance(inputs, dict):
        return {name: _some_rows(value) for name, value in inputs.items()}
    return inputs[:ROWS_TRIED] if isinstance(inputs, torch.Tensor) and inputs.dim() > 0 else inputs


def _described(args: tuple, kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

    if kwargs:
        return "{" + ", ".join(f"{name}: {one(value)}" for name, value in kwargs.items()) + "}"
    return "(" + ", ".join(map(one, args)) + ")"
