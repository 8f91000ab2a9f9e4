# SPDX-License-Identifier: Apache-2.0
"""Quantizes a folder of transformers into another one, tensor by tensor: the float model is never in memory.

What is a linear layer is learned from a skeleton without weights. The new folder is written under another name beside
its place and renamed when it is whole, so an interrupted run leaves nothing that could be taken for a checkpoint.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.float_types import FLOAT_DTYPES
from ..files import computed, format_of, recognizing, safetensors
from ..files.compressed_tensors import quantization_config
from ..files.config_json import CONFIG, ENTRY, read_config
from ..files.disk import folder_argument, scratch
from ..files.format import FileFormat, Stored
from ..files.renaming import by_name_of, missing_from, own_names
from ..files.skeleton import skeleton as skeleton_of
from ..nn import QuantLinear
from ..nn.replacements import bias_of, features_of, kind_of, with_tensors
from .folder_files import copy_others
from .plan import Layer, plan_skeleton, report_of, require_finite
from .report import QuantizationReport
from .selection import Embeddings, Patterns, SchemeLike, Selection

GB = 10**9


@dataclass(frozen=True, repr=False)
class FolderReport(QuantizationReport):
    """The report of a folder, which also says what became of everything that is no layer.

    unknown    names of tensors that were copied although the model has no place for them, such as tensors of more
               layers than config.json speaks of
    left_out   {file or folder of the source that was not copied: why}
    """

    unknown: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `QuantizationReport.to_dict` gives, and the two fields of this class."""
        return {**super().to_dict(), "unknown": self.unknown, "left_out": self.left_out}

    @property
    def notes(self) -> list[str]:
        """A line for each thing that the table does not show."""
        lines = []
        if self.unknown:
            lines.append(f"copied, but the model has no place for them: {_some(self.unknown)}")
        for reason in sorted(set(self.left_out.values())):
            names = sorted(name for name, why in self.left_out.items() if why == reason)
            lines.append(f"not copied ({reason}): {', '.join(names)}")
        return lines

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.notes])

    def _repr_html_(self) -> str:
        return super()._repr_html_() + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)


def quantize_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    scheme: SchemeLike,
    *,
    exclude: Patterns = None,
    include_embeddings: Embeddings = False,
    shard_size: int = 4 * GB,
    progress: bool = False,
) -> FolderReport:
    """Writes `output`, a compressed-tensors checkpoint of the float model in `source`, and reports on every layer.

    source       a folder of transformers: config.json and safetensors, one file or shards with an index
    output       a new or empty folder
    scheme       one that needs no data, or its class
    exclude, include_embeddings   as in `octavo.quantize_`
    shard_size   bytes of tensors in one file, more only if one layer is larger
    The peak of memory is about twice the largest tensor, and what malloc keeps. Tied layers stay float and tied.
    All other files are copied, also from subfolders, but for weights in formats that nothing here reads, code and
    hidden files; the report names what is left out. `octavo.load(output)` reads the result.

    Raises: FileNotFoundError for a missing file; ImportError if transformers is missing; ValueError for a damaged,
    incomplete, unsafe or already quantized checkpoint, for NaN or Inf in a weight, for a scheme that needs data, and if
    `output` holds anything. Then `output` is as it was.
    Source: ours.
    """
    source = folder_argument("quantize_folder", source)
    output = folder_argument("quantize_folder", output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give a new one")
    config = read_config(source)
    format = _float_format(source)
    skeleton = skeleton_of(source)
    stored = format.catalog(source)
    layers = plan_skeleton(
        skeleton, Selection(scheme, exclude=exclude, include_embeddings=include_embeddings)
    )
    _require_servable(layers)
    unknown = _unknown_tensors(source, skeleton, stored)
    parts = _parts(skeleton, layers, stored)
    with _appearing(output) as folder:
        _write_weights(folder, parts, stored, shard_size, progress)
        left_out = copy_others(source, folder, {entry.path for entry in stored.values()})
        config[ENTRY] = quantization_config(skeleton)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return FolderReport(report_of(layers).rows, unknown, left_out)


def _float_format(source: Path) -> FileFormat:
    """The format in which `source` holds a float model. Raises: ValueError if there is none."""
    for each in recognizing(source):
        if not each.is_quantized(source):
            return each
    format_of(source)  # which says what is read, if no format knows the files
    raise ValueError(f"{source} is quantized already; give the folder of the float model")


def _require_servable(layers: list[Layer]) -> None:
    chosen = [layer.scheme for layer in layers if layer.scheme is not None]
    if not chosen:
        reasons = sorted({layer.row.reason for layer in layers})
        raise ValueError(f"no layer would be quantized; the reasons: {reasons}")
    for scheme in chosen:
        if scheme.needs_data:
            raise ValueError(
                f"{scheme.name} needs data to calibrate, and with it the whole model: load that with transformers, use "
                "octavo.quantize_(model, scheme, data=batches) and save_pretrained"
            )


def _unknown_tensors(source: Path, skeleton: nn.Module, stored: dict[str, Stored]) -> list[str]:
    """Tensors that `skeleton` has no place for. Raises ValueError if it has a place for more than there are."""
    metas = {name: entry.meta for name, entry in stored.items()}
    found, unknown = by_name_of(skeleton, metas, set())
    missing = missing_from(skeleton, found, set())
    missing -= computed.may_be_missing(skeleton, missing).keys()
    if missing:
        raise ValueError(
            f"the files of {source} do not hold {_some(missing)}, which a {type(skeleton).__name__} has; transformers "
            "would fill them with random numbers. Give a folder that save_pretrained wrote of the model you mean, or "
            "correct `architectures` in config.json"
        )
    return sorted(unknown - dict(skeleton.named_buffers()).keys())


def _some(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")


@dataclass
class _Part:
    """Tensors that are written together: all those of a quantized layer, or one tensor that stays as it is."""

    name: str  # of the tensor in the source, a weight if there is a layer
    layout: dict[str, torch.Tensor]  # by the names to write, on meta
    layer: Layer | None = None
    bias: str | None = None
    followers: list[Layer] = field(default_factory=list)  # which share the layer's weight

    def tensors(self, stored: dict[str, Stored]) -> Iterable[tuple[str, torch.Tensor]]:
        tensor = stored[self.name].read()
        if self.layer is None:
            return [(self.name, tensor)]
        bias = None if self.bias is None else stored[self.bias].read()
        layer = _quantized(self.layer, tensor, bias)
        for follower in self.followers:
            _quantized(follower, tensor, None if bias_of(follower.module) is None else follower.module.bias)
        for planned in (self.layer, *self.followers):
            planned.module = None  # the plan outlives it
        del tensor  # before the codes are unpacked
        return layer.state_dict(prefix=self.name.removesuffix("weight")).items()


def _quantized(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantLinear:
    assert layer.scheme is not None
    linear = layer.module = with_tensors(layer.module, weight, bias)
    require_finite(layer)
    prepared = layer.scheme.prepare_linear(linear)
    new = layer.scheme.freeze(prepared, None if layer.shares is None else layer.shares.module)
    layer.becomes(new, "quantized")
    return new


def _parts(skeleton: nn.Module, layers: list[Layer], stored: dict[str, Stored]) -> list[_Part]:
    """What to write, in the order of the source; the layers of `skeleton` become what they will be, on meta."""
    parts = {name: _Part(name, {name: entry.meta}) for name, entry in stored.items()}
    in_file = {own: name for name, own in own_names(skeleton, stored).items()}
    for layer in layers:
        if layer.scheme is None or layer.shares is not None:
            continue
        followers = [each for each in layers if each.shares is layer]
        name, bias = _names_in_file(layer, followers, in_file)
        found = stored[name].meta
        if found.dtype not in FLOAT_DTYPES:
            for each in (layer, *followers):
                each.keep(f"the weight is {found.dtype}")
            continue
        wanted = tuple(layer.module.weight.shape)
        if tuple(found.shape) != wanted:
            raise ValueError(f"{name!r} has shape {tuple(found.shape)}, config.json makes it {wanted}")
        layout = _put_into(skeleton, layer).state_dict(prefix=name.removesuffix("weight"))
        if bias is not None:
            layout[bias] = parts.pop(bias).layout[bias]
        parts[name] = _Part(name, layout, layer, bias, followers)
        for each in followers:
            _put_into(skeleton, each)
    return list(parts.values())


def _put_into(skeleton: nn.Module, layer: Layer) -> QuantLinear:
    """Makes of `layer` in `skeleton` what it will be, on meta."""
    assert layer.scheme is not None
    k, n = features_of(layer.module)
    kind, has_bias = layer.scheme.layer_for(layer.module), bias_of(layer.module) is not None
    new = kind(k, n, has_bias, scheme=layer.scheme, device="meta")
    new.replaces = kind_of(layer.module)
    for place in layer.names:
        skeleton.set_submodule(place, new)
    return new


def _names_in_file(layer: Layer, followers: list[Layer], in_file: dict[str, str]) -> tuple[str, str | None]:
    """The names in the file of a layer's weight, which may be that of a follower, and, if it has one, of its bias."""
    wanted = ["weight"] if bias_of(layer.module) is None else ["weight", "bias"]
    found = [in_file[f"{layer.name}.{leaf}"] for leaf in wanted if f"{layer.name}.{leaf}" in in_file]
    shared = [f"{name}.weight" for each in (layer, *followers) for name in each.names]
    if len(wanted) == 1 and not found:
        found = [in_file[name] for name in shared if name in in_file][:1]
    if len(found) < len(wanted):
        raise ValueError(
            f"the files do not hold {layer.name!r} as it is: transformers makes it of other tensors while it loads. "
            f"Keep it float with exclude={layer.name!r}, or load the model with transformers and use octavo.quantize_ "
            "and save_pretrained"
        )
    return found[0], found[1] if len(found) == 2 else None


def _write_weights(
    folder: Path, parts: list[_Part], stored: dict[str, Stored], shard_size: int, progress: bool
) -> None:
    files = list(_cut(parts, shard_size))
    weight_map = {}
    with _bar(sum(safetensors.nbytes(part.layout) for part in parts), progress) as bar:
        for number, file in enumerate(files, 1):
            name = (
                f"model-{number:05d}-of-{len(files):05d}.safetensors"
                if len(files) > 1
                else safetensors.WEIGHTS
            )
            layout = {key: meta for part in file for key, meta in part.layout.items()}
            safetensors.write(folder / name, layout, _tensors(file, stored, bar))
            weight_map.update(dict.fromkeys(layout, name))
    if len(files) > 1:
        size = sum(safetensors.nbytes(part.layout) for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cut(parts: list[_Part], shard_size: int) -> Iterator[list[_Part]]:
    file: list[_Part] = []
    size = 0
    for part in parts:
        more = safetensors.nbytes(part.layout)
        if file and size + more > shard_size:
            yield file
            file, size = [], 0
        file.append(part)
        size += more
    yield file


def _tensors(file: list[_Part], stored: dict[str, Stored], bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for part in file:
        yield from part.tensors(stored)
        bar.update(safetensors.nbytes(part.layout))


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm  # not at the top: in a notebook without ipywidgets its import alone warns

    return tqdm(total=total, desc="quantizing", unit="B", unit_scale=True, disable=not progress)


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `output` if all goes well, and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch(output.parent, f".{output.name}.", ".partial") as temporary:
        yield temporary
        os.rename(temporary, output)
