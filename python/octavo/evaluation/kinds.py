# SPDX-License-Identifier: Apache-2.0
"""The four kinds of models: what a batch holds for each, which part of the output counts, and which kind a model is.

The kind is tried out, not guessed from names: a causal language model is one whose logits do not change when later
tokens do; an encoder gives hidden states or vectors of length 1. Where a batch could be read in two ways, the user is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..base.batches import output_of
from ..base.forward_arguments import LABELS, described, labels_in, parameters_of, positional, taken
from ..base.padding import attended
from ..metrics.distribution import NO_TARGET

KINDS = ("language_model", "classifier", "encoder", "module")
VECTORS = ("sentence_embedding", "last_hidden_state")  # outputs that mark an encoder, the better one first
ROWS_TRIED = 4  # of the first batch, to find out what kind a model is


@dataclass(frozen=True)
class Call:
    """One batch taken apart: what the model is called with, the right answers, which positions count, and a sentence
    about what of it is not used."""

    args: tuple
    kwargs: dict[str, Any]
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    note: str = ""


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


def take_apart(
    kind: str, args: tuple, kwargs: dict[str, Any], model: nn.Module | None = None, is_alone: bool = False
) -> Call:
    """What `kind` makes of a batch; of the rest of it `model` gets what its forward takes.

    is_alone   the batch was given by itself, not in a list
    Raises: TypeError, ValueError if the batch is not of that kind.
    """
    if kind == "language_model":
        call = _language_call(args, kwargs)
    elif kind == "classifier":
        call = _classifier_call(args, kwargs)
    else:
        call = Call(args, kwargs)
    if model is None:
        return call
    args, kwargs, note = taken(
        model, call.args, call.kwargs, who="evaluate", is_alone=is_alone, is_input=True
    )
    return replace(call, args=args, kwargs=kwargs, note=note)


def _language_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    ids = kwargs.get("input_ids") if kwargs else args[0] if len(args) == 1 else None
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] < 2:
        found = (
            f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else described(args, kwargs)
        )
        raise ValueError(
            f"evaluate: a batch for a language model is int64 [batch, 2 or more], alone or as input_ids; got {found}"
        )
    if not kwargs:
        return Call((ids[:, :-1],), {}, ids[:, 1:])
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(
            f"evaluate: labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; a language model's "
            "labels are its tokens, -100 where none shall be predicted"
        )
    targets = (ids if labels is None else labels)[:, 1:]
    counts = None if labels is None else targets != NO_TARGET
    if mask is not None and (text := attended(mask)) is not None:
        # A position counts if it is text and what it predicts is text: padding may be on either side.
        text = (text[:, :-1] & text[:, 1:]).expand(targets.shape)
        counts = text if counts is None else counts & text
    rest = {name: _but_last(name, value, ids) for name, value in kwargs.items() if name != "labels"}
    return Call((), rest, targets, counts)


def _but_last(name: str, value: Any, ids: torch.Tensor) -> Any:
    """`value` without its entry for the last token, if it has one entry for each token."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    length, is_mask = ids.shape[1], "mask" in name
    if is_mask and value.dim() > 2 and value.shape[-1] == length:  # [batch, heads, queries, keys]
        return value[..., :-1, :-1] if value.shape[-2] == length else value[..., :-1]
    if value.shape[:2] == ids.shape:
        return value[:, :-1]
    is_along = is_mask or "position" in name or "token_type" in name
    return value[..., :-1] if is_along and value.shape[-1] == length else value


def _classifier_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    if kwargs:
        labels, rest = labels_in(kwargs), {k: v for k, v in kwargs.items() if k not in LABELS}
    else:
        labels, rest = (args[-1], {}) if len(args) > 1 else (None, {})
        args = args[:-1] if len(args) > 1 else args
    if labels is None:
        return Call(args, rest)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ValueError(
            "evaluate: a batch for a classifier is (x, labels) with integer labels; got "
            f"{described((*args, labels) if args else (), {**rest, 'labels': labels} if rest else {})}"
        )
    return Call(args, rest, labels.long(), labels != NO_TARGET)


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
    name = _vectors_name(output)
    if name is None:
        raise TypeError(
            f"evaluate: the output is {type(output).__name__}; an encoder gives a float tensor [batch, dim], "
            "sentence_embedding or last_hidden_state. kind='module' compares any tensors"
        )
    found = _part(output, name)
    if name == "sentence_embedding":
        return found
    weights = torch.ones_like(found[..., 0]) if mask is None else mask.expand(found.shape[:2])
    weights = weights.to(found.dtype).unsqueeze(-1)
    return (found * weights).sum(1) / weights.sum(1)


def _vectors_name(output: Any) -> str | None:
    return next((name for name in VECTORS if _part(output, name) is not None), None)


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def choose_kind(
    reference: nn.Module, args: tuple, kwargs: dict[str, Any], is_alone: bool = False
) -> tuple[str, str]:
    """The kind of a model and why, from what it does with its first batch.

    is_alone   the batch was given by itself, not in a list
    Raises: ValueError if the batch can be read in more than one way.
    """
    if labels_in(kwargs) is not None or (len(args) == 2 and _may_be_labels(args)):
        found = _kind_with_labels(reference, args, kwargs)
        if found is not None:
            return found
        kwargs = {name: value for name, value in kwargs.items() if name not in LABELS}
    args, kwargs, _ = taken(reference, args, kwargs, who="evaluate", is_alone=is_alone)
    ids: Any = kwargs.get("input_ids") if kwargs else args[0] if len(args) == 1 else None
    output = _tried(reference, args, kwargs, _is_ids(ids))
    if _is_ids(ids) and _looks_like_logits(output, ids[:ROWS_TRIED]):
        return _kind_with_token_logits(reference, _language_call(args, kwargs))
    if _holds_hidden_states(output):
        return "encoder", "its output holds hidden states and no logits"
    if _is_of_length_1(output):
        return "encoder", "its output is vectors of length 1"
    return "module", "nothing in its batches or output tells more"


def _kind_with_token_logits(reference: nn.Module, call: Call) -> tuple[str, str]:
    if is_causal(reference, call.args, call.kwargs):
        return "language_model", "it gives logits for each token that do not change with later tokens"
    return "module", "its logits for a token change with later tokens"


def _holds_hidden_states(output: Any) -> bool:
    """Whether hidden states or sentence vectors are in the output, and no logits."""
    is_tensor_or_has_logits = isinstance(output, torch.Tensor) or hasattr(output, "logits")
    return not is_tensor_or_has_logits and _vectors_name(output) is not None


def _is_of_length_1(output: Any) -> bool:
    """Whether the output is one float vector of length 1 for each row of the batch."""
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or not output.is_floating_point():
        return False
    return bool(((output.double().norm(dim=-1) - 1).abs() < 1e-3).all())


def _tried(reference: nn.Module, args: tuple, kwargs: dict[str, Any], is_ids: bool) -> Any:
    args, kwargs = _some_rows((args, kwargs))
    try:
        return output_of(reference, args, kwargs)
    except Exception:
        if not is_ids:
            raise
    # A window for a language model is one token longer than what the model reads, which may be all it can read.
    call = _language_call(args, kwargs)
    return output_of(reference, call.args, call.kwargs)


def is_causal(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether logits stay what they are when all tokens of the second half of the window are others."""
    args, kwargs = _some_rows((args, kwargs))
    ids = kwargs["input_ids"] if kwargs else args[0]
    half = ids.shape[1] // 2
    before = logits_of(output_of(model, args, kwargs))
    changed = ids.clone()
    # Another token of the same batch: always one that the model knows.
    changed[:, half:] = torch.where(ids[:, half:] == ids.min(), ids.max(), ids.min())
    after = logits_of(
        output_of(model, *(((), {**kwargs, "input_ids": changed}) if kwargs else ((changed,), {})))
    )
    x, y = before[:, :half].double(), after[:, :half].double()
    mask = kwargs.get("attention_mask")
    if mask is not None and (text := attended(mask)) is not None:  # padding may look at anything
        text = text.expand(ids.shape)[:, :half]
        x, y = x[text], y[text]
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    # A causal mask makes the difference exactly 0; 1e-5 of the largest logit leaves room for float32 rounding.
    return x.numel() == 0 or bool((x - y).abs().max() <= 1e-5 * x.abs().max())


def _kind_with_labels(reference: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """The kind of a model whose batch has labels; None if they are real numbers, which say nothing about the kind."""
    given = labels_in(kwargs) if kwargs else args[-1]
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        return None
    if kwargs or _takes_one(reference):
        call = take_apart("classifier", args, kwargs, reference)
        assert call.targets is not None  # the caller has seen them
        logits = logits_of(output_of(reference, *_some_rows((call.args, call.kwargs))))
        if _are_tokens(call, logits) and is_causal(reference, call.args, call.kwargs):
            return "language_model", "it gives logits for each token that do not change with later tokens"
        if _are_classes(call.targets, logits):
            what = "row" if logits.dim() == 2 else "position"
            return "classifier", f"its batches hold one label for each {what} of logits"
    raise ValueError(
        f"evaluate: a batch of {described(args, kwargs)} can be read in more than one way; say kind='classifier' "
        "if it ends with labels, kind='language_model' for token ids, kind='module' if all of it is the model's input"
    )


def _are_tokens(call: Call, logits: torch.Tensor) -> bool:
    """Whether there is a label for each token, as language models have them."""
    ids, labels = call.kwargs.get("input_ids"), call.targets
    return (
        ids is not None
        and labels is not None
        and labels.shape == ids.shape
        and logits.dim() == 3
        and _is_ids(ids)
    )


def _are_classes(labels: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether each label is a class of `logits`. The logits may be of the first rows only."""
    given = labels[labels != NO_TARGET]
    in_range = bool(((0 <= given) & (given < logits.shape[-1])).all())
    return in_range and labels[: len(logits)].shape == logits.shape[:-1]


def _may_be_labels(args: tuple) -> bool:
    x, labels = args
    if not isinstance(x, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return False
    return labels.dim() == 1 and not labels.is_floating_point() and len(x.shape) > 0 and len(x) == len(labels)


def _takes_one(model: nn.Module) -> bool:
    places = positional(parameters_of(model))
    return places is not None and len(places) == 1


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
    """The first rows of every tensor, which are enough here; all rows if tensors have different numbers of rows."""
    rows = {len(tensor) for tensor in _tensors(inputs) if tensor.dim() > 1} - {1}
    return _first_rows(inputs, rows.pop()) if len(rows) == 1 else inputs


def _first_rows(inputs: Any, rows: int) -> Any:
    if isinstance(inputs, tuple):
        return tuple(_first_rows(value, rows) for value in inputs)
    if isinstance(inputs, dict):
        return {name: _first_rows(value, rows) for name, value in inputs.items()}
    is_batch = isinstance(inputs, torch.Tensor) and inputs.dim() > 0 and len(inputs) == rows
    return inputs[:ROWS_TRIED] if is_batch else inputs


def _tensors(inputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, tuple | dict):
        for value in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _tensors(value)
