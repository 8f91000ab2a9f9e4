# SPDX-License-Identifier: Apache-2.0
"""What a layer, a conversion and a load take of memory, as the kernel counts what is resident. Linux only.

Each number comes from a process of its own: `python -m limits.memory layer Int8Dynamic 16`, run in benchmarks/, prints
one of them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import octavo

BENCHMARKS = Path(__file__).resolve().parents[1]
WIDTH, DEPTH = 4096, 8  # of the model that is converted; a layer alone has the same width
BATCHES = [1, 16, 256, 1024]
SCHEMES = {"Int8Dynamic": octavo.Int8Dynamic(), "Int8WeightOnly": octavo.Int8WeightOnly()}
FLOAT_LAYER_MB = WIDTH * WIDTH * 4 / 1e6


def megabytes_of_process(field: str) -> float:
    """VmRSS or RssAnon, resident now, or VmHWM, the highest VmRSS. getrusage's ru_maxrss would not do: a new process
    starts with its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def in_use() -> float:
    """Megabytes that somebody holds, without what malloc keeps of freed buffers."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return megabytes_of_process("RssAnon")


def start_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to VmRSS


def warm_up(scheme: octavo.schemes.Scheme) -> None:
    """Threads, code and small buffers that the first layer of a process brings with it."""
    octavo.quantized(nn.Linear(1024, 1024), scheme)(torch.randn(64, 1024))


def float_model() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]).requires_grad_(False)


def layer(scheme: octavo.schemes.Scheme, batch: int) -> dict[str, float]:
    """Of one layer after its first run, and what stays when it is gone: the threads' scratch."""
    warm_up(scheme)
    before = in_use()
    quantized = octavo.quantized(nn.Linear(WIDTH, WIDTH).requires_grad_(False), scheme)
    quantized(torch.randn(batch, WIDTH))
    after = in_use()
    del quantized
    scratch = in_use() - before
    return {"layer_mb": after - before - scratch, "scratch_mb": scratch}


def conversion(scheme: octavo.schemes.Scheme) -> dict[str, float]:
    """Of `quantize_` in place: highest and last, with the float model's own size for comparison."""
    warm_up(scheme)
    outside = megabytes_of_process("VmRSS")
    model = float_model()
    model_mb = DEPTH * FLOAT_LAYER_MB
    start_peak()
    octavo.quantize_(model, scheme)
    peak = megabytes_of_process("VmHWM") - outside
    return {
        "peak_mb": peak,
        "peak_over_model_and_layer": peak / (model_mb + FLOAT_LAYER_MB),
        "resident_mb": megabytes_of_process("VmRSS") - outside,
    }


def loading(scheme: octavo.schemes.Scheme, folder: str) -> dict[str, float]:
    """Of `octavo.load` into a skeleton on the meta device and the first run: highest and last."""
    warm_up(scheme)
    outside = megabytes_of_process("VmRSS")
    with torch.device("meta"):
        skeleton = float_model()
    start_peak()
    octavo.load(folder, skeleton)(torch.randn(1, WIDTH))
    peak = megabytes_of_process("VmHWM") - outside
    return {"peak_mb": peak, "resident_mb": megabytes_of_process("VmRSS") - outside}


def in_a_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "limits.memory", *map(str, arguments), str(torch.get_num_threads())]
    return json.loads(
        subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True).stdout
    )


def measure(rounds: int = 1) -> list[dict[str, object]]:
    """Megabytes; of several rounds the last. A 4096 x 4096 layer has 16.8 MB of codes, the model of 8 such layers 537
    MB of floats; `peak_over_model_and_layer` is the highest resident set over that of the float model and one layer."""
    rows: list[dict[str, object]] = []
    for name, scheme in SCHEMES.items():
        for batch in BATCHES:
            for _ in range(rounds):
                found = in_a_process("layer", name, batch)
            rows.append({"what": "layer", "scheme": name, "batch": batch, **found})
        with tempfile.TemporaryDirectory() as folder:
            octavo.save(octavo.quantized(float_model(), scheme), folder)
            for _ in range(rounds):
                converted, loaded = in_a_process("conversion", name), in_a_process("loading", name, folder)
        rows.append({"what": "conversion", "scheme": name, **converted})
        rows.append({"what": "loading", "scheme": name, **loaded})
    return rows


def main(what: str, scheme: str, *rest: str) -> None:
    *arguments, threads = rest
    torch.set_num_threads(int(threads))
    if what == "layer":
        found = layer(SCHEMES[scheme], int(arguments[0]))
    elif what == "conversion":
        found = conversion(SCHEMES[scheme])
    else:
        found = loading(SCHEMES[scheme], arguments[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
