# SPDX-License-Identifier: Apache-2.0
"""What a model costs: bytes on disk and in memory, time, energy. What cannot be measured is said, never estimated."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from ..files import save
from ..nn.replacements import replacement_of
from ..runtime.timing import Times, interleaved
from .energy import joules_per_call
from .generation import Decoder, Prompts
from .peak_memory import peak_memory

RESOURCES = ("size", "speed", "peak_memory")
ROUNDS, SECONDS = 15, 3.0  # timed calls of each model, taking turns, within about so many seconds
DECODED, DECODED_ROUNDS = 16, 3  # tokens at a time, timed calls


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's parameters and buffers, shared ones counted once.

    codes, scales, zero_points   of the quantized layers, as they lie in memory: packed codes include their padding
    other                        everything else: float weights, biases, column sums
    """

    codes: int
    scales: int
    zero_points: int
    other: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.zero_points + self.other


@dataclass(frozen=True)
class ModelResources:
    """One model's costs; None: not asked for, or not measurable here (`Resources.unavailable` says why).

    bytes_on_disk                as `octavo.save` writes it
    memory, bits_per_weight      see `Memory` and `bits_per_weight`
    latency                      of one call on the first batch, seconds
    prefill_tokens_per_second    tokens of that batch / median latency, for a language model
    decode_tokens_per_second     of one text, token by token, after the first prompt
    joules_per_call              on the first batch, whole CPU packages, from RAPL
    peak_rss, peak_rss_before    of a fresh process after it has loaded the model and run the first batch, and before;
                                 bytes
    """

    bytes_on_disk: int | None = None
    memory: Memory | None = None
    bits_per_weight: float | None = None
    latency: Times | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    joules_per_call: float | None = None
    peak_rss: int | None = None
    peak_rss_before: int | None = None


@dataclass(frozen=True)
class Resources:
    """The costs of both models. unavailable: what could not be measured, and why."""

    reference: ModelResources
    model: ModelResources
    unavailable: dict[str, str] = field(default_factory=dict)


def memory_of(model: nn.Module) -> Memory:
    """What a model's bytes hold. They add up to the bytes that `octavo.compare` gives."""
    counts = {"codes": 0, "scales": 0, "zero_points": 0, "other": 0}
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                counts[_part(module, name)] += tensor.nbytes
    return Memory(**counts)


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits of codes, scales and zero points for each weight of the quantized layers, as they lie in memory.

    For a model without quantized layers these are the bits of the weights of its linear layers; None if it has none.
    Source: docs/numerics.md, eq. 27.
    """
    quantized: list[Any] = [module for module in model.modules() if _is_quantized(module)]
    # A weight that layers share counts once.
    layers = {id(getattr(layer, "shared", None) or layer): layer for layer in quantized}.values()
    if layers:
        memories = [memory_of(layer) for layer in layers]
        stored = sum(memory.total - memory.other for memory in memories)
        return 8 * stored / sum(_weight_count(layer) for layer in layers)
    linears: list[Any] = [module for module in model.modules() if replacement_of(module) is not None]
    weights = {id(linear.weight): linear.weight for linear in linears}.values()
    count = sum(weight.numel() for weight in weights)
    return 8 * sum(weight.nbytes for weight in weights) / count if count else None


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of the folder that `octavo.save` writes, which is made in a temporary place and removed.

    Raises: as `octavo.save`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def measure_resources(
    models: Mapping[str, nn.Module],
    call: tuple[tuple, dict[str, Any]],
    wanted: Collection[str],
    tokens: int | None = None,
    prompts: Prompts | None = None,
) -> Resources:
    """The resources of "reference" and "model", measured in turns on one call (args, kwargs).

    wanted   some of RESOURCES
    tokens   tokens in the call, for a language model; prompts: the first is decoded after
    """
    args, kwargs = call
    runs: dict[str, Callable[[], object]]
    runs = {name: partial(model, *args, **kwargs) for name, model in models.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    unavailable: dict[str, str] = {}
    if "size" in wanted:
        for name, model in models.items():
            found[name].update(memory=memory_of(model), bits_per_weight=bits_per_weight(model))
            _try("bytes_on_disk", partial(_disk, model), found[name], unavailable)
    if "speed" in wanted:
        for name, times in interleaved(runs, rounds=ROUNDS, seconds=0, limit=SECONDS).items():
            found[name]["latency"] = times
            if tokens is not None:
                found[name]["prefill_tokens_per_second"] = tokens / times.median
        if prompts is not None:
            for name, speed in decoding_speeds(models, prompts).items():
                found[name]["decode_tokens_per_second"] = speed
        for name, run in runs.items():
            _try("joules_per_call", partial(_joules, run), found[name], unavailable)
    if "peak_memory" in wanted:
        for name, model in models.items():
            _try("peak_rss", partial(_peak, model, args, kwargs), found[name], unavailable)
    return Resources(ModelResources(**found["reference"]), ModelResources(**found["model"]), unavailable)


def to_dict(resources: Resources) -> dict[str, Any]:
    """Plain dicts, with the sum of the memory's parts beside them."""
    fields = asdict(resources)
    for name in ("reference", "model"):
        memory = getattr(resources, name).memory
        if memory is not None:
            fields[name]["memory"]["total"] = memory.total
    return fields


def _try(
    figure: str, measure: Callable[[], dict[str, Any]], found: dict[str, Any], unavailable: dict[str, str]
) -> None:
    try:
        found.update(measure())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        unavailable[figure] = str(error)


def _disk(model: nn.Module) -> dict[str, Any]:
    return {"bytes_on_disk": bytes_on_disk(model)}


def _joules(run: Callable[[], object]) -> dict[str, Any]:
    return {"joules_per_call": joules_per_call(run)}


def _peak(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    before, peak = peak_memory(model, args, kwargs)
    return {"peak_rss_before": before, "peak_rss": peak}


def decoding_speeds(models: Mapping[str, nn.Module], prompts: Prompts) -> dict[str, float]:
    """Median tokens per second after the first prompt, models in turns; the prompt's own run is not counted."""
    ids, steps = prompts.tensors()[0][None], min(DECODED, prompts.new_tokens)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + DECODED_ROUNDS):
        for name, model in models.items():
            decoder = Decoder(model, prompts.cache)
            token = decoder.start(ids)[:, -1].argmax(-1)
            start = time.perf_counter()
            for _ in range(steps):
                token = decoder.step(token).argmax(-1)
            samples[name].append(time.perf_counter() - start)
    return {name: steps / median(times[1:]) for name, times in samples.items()}  # the first one warms up


def _is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a quantized layer: it has a scheme and knows its codes."""
    return hasattr(module, "scheme") and callable(getattr(module, "codes", None))


def _weight_count(layer: Any) -> int:
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features * layer.out_features
    return layer.codes().numel()


def _part(module: Any, name: str) -> str:
    if not _is_quantized(module):
        return "other"
    if name.startswith("outlier"):
        return "scales" if name == "outlier_scale" else "codes"
    return "scales" if "multiplier" in name else module.scheme.weights.part_of(name)
