# SPDX-License-Identifier: Apache-2.0
"""Trains the byte language model on the standard library's sources and writes the package's checkpoint.

1800 steps of 24 windows, about 10 minutes on one idle core. The same bits come out for the same Python, torch, CPU and
number of threads. The held-out files (octavo.lab.study.byte_text) are never seen.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo.lab.study import byte_lm, byte_text
from octavo.lab.study.byte_training import TrainingConfig, next_byte_loss, train


def save(model: byte_lm.ByteLM, path: Path) -> None:
    """Writes the weights in bfloat16, the shared one once."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del weights["head.weight"]  # the embedding's
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=byte_lm.CHECKPOINT, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainingConfig(steps=options.steps)
    torch.manual_seed(config.seed)
    model, text, start = byte_lm.ByteLM(), byte_text.training_bytes(), time.perf_counter()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text", flush=True
    )

    def after_step(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step:5}  loss {loss:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
        if step % 300 == 0:
            save(model, options.output)

    train(model, text, config, after_step)
    save(model, options.output)
    with torch.inference_mode():
        loss = next_byte_loss(byte_lm.load(options.output), byte_text.held_out()).item()
    print(
        f"held-out perplexity {math.exp(loss):.4f}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
