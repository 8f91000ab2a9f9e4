# SPDX-License-Identifier: Apache-2.0
"""Whisper tiny.en with every scheme: words wrong, seconds, megabytes, and the KL divergence from float along the float
model's transcript.

The speech is synthesized with espeak-ng (Debian: apt-get install espeak-ng), which sounds like a robot: compare with
the float model's words wrong, not with zero.

Usage, in benchmarks/: python -m suites.speech [--schemes NAME ...] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import octavo
import tables
from octavo.evaluation import bits_per_weight
from octavo.evaluation.comparison import model_bytes
from octavo.metrics import DistributionAccumulator
from octavo.nn.fused.attention_call import cache_parameter
from octavo.schemes import SCHEMES, Scheme, by_name, label
from suites import whisper
from timing import machine

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Please send the report to the office before nine o'clock on Monday morning.",
    "In the year nineteen sixty nine, two astronauts walked on the moon.",
    "The recipe needs three eggs, two cups of flour and a little sugar.",
    "She said that the train to London was delayed because of heavy snow.",
    "Quantization makes neural networks smaller and faster on ordinary computers.",
    "A small model can understand speech without sending it to a distant server.",
    "We measured the error of every layer and wrote the numbers into a table.",
    "The children built a tall tower of wooden blocks and laughed when it fell.",
    "Tomorrow the weather will be cloudy with some rain in the afternoon.",
)
RATE = 16000  # samples per second that Whisper listens to
LONGEST = 60  # tokens of a transcript


def spoken(sentence: str) -> np.ndarray:
    """float32 [samples] at RATE. Raises: FileNotFoundError without espeak-ng."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.wav")
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", path, sentence], check=True)
        with wave.open(str(path)) as file:
            samples, rate = np.frombuffer(file.readframes(file.getnframes()), np.int16), file.getframerate()
    # Resampled by its spectrum: what is above half of RATE is cut off.
    count = len(samples) * RATE // rate
    spectrum = np.fft.rfft(samples / 32768)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * count / len(samples)).astype(np.float32)


def transcribe(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Greedy: int64 [1, tokens] with START and without END."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    heard = model.model.encoder(features)
    ids = new = torch.tensor([whisper.START])
    cache = {cache_parameter(model.forward): EncoderDecoderCache(DynamicCache(), DynamicCache())}
    for _ in range(LONGEST):
        output = model(encoder_outputs=heard, decoder_input_ids=new, use_cache=True, **cache)
        new = output.logits[:, -1:].argmax(-1)
        if new.item() == whisper.END:
            break
        ids = torch.cat([ids, new], 1)
    return ids


def words_wrong(expected: str, found: str) -> int:
    """Words to change, add or take away: the edit distance."""
    a, b = words(expected), words(found)
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).split()


def schemes() -> list[Scheme]:
    """Every registered scheme that needs no data, as the study has it."""
    plain = [variant for scheme in SCHEMES.values() for variant in scheme.study_variants()]
    return [each for each in plain if not each.needs_data]


def measure(chosen: list[Scheme] | None = None) -> list[dict[str, Any]]:
    """One row for the float model and for each scheme; none without espeak-ng, which is said."""
    if shutil.which("espeak-ng") is None:
        print("speech: espeak-ng is missing, which speaks: apt-get install espeak-ng", file=sys.stderr)
        return []
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor

    listen = WhisperFeatureExtractor(feature_size=whisper.SIZES["num_mel_bins"])
    heard = [
        listen(spoken(sentence), sampling_rate=RATE, return_tensors="pt").input_features
        for sentence in SENTENCES
    ]
    reference = whisper.load()
    tokenizer = Tokenizer.from_file(str(whisper.folder() / "tokenizer.json"))
    models: dict[str, nn.Module] = {"fp32": reference}
    models |= {label(scheme): octavo.quantized(reference, scheme) for scheme in chosen or schemes()}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        transcripts = [transcribe(reference, features) for features in heard]
        for name, model in models.items():
            start = time.perf_counter()
            found = [tokenizer.decode(transcribe(model, features)[0].tolist()) for features in heard]
            seconds = time.perf_counter() - start
            distribution = divergence(reference, model, heard, transcripts)
            pairs = list(zip(SENTENCES, found, strict=True))
            rows.append(
                {
                    "candidate": name,
                    "bits_per_weight": bits_per_weight(model),
                    "megabytes": model_bytes(model) / 1e6,
                    "words_wrong": sum(words_wrong(sentence, text) for sentence, text in pairs),
                    "words": sum(len(words(sentence)) for sentence in SENTENCES),
                    "kld": distribution.kld,
                    "top1_agreement": distribution.top1_agreement,
                    "seconds": seconds,
                    "transcripts": found,
                }
            )
            print(f"{name} has listened", file=sys.stderr)
    return rows


def divergence(reference: Any, model: Any, heard: list[torch.Tensor], transcripts: list[torch.Tensor]) -> Any:
    """Of the next token's distribution, along the reference's transcripts."""
    found = DistributionAccumulator()
    for features, ids in zip(heard, transcripts, strict=True):
        logits = [each(input_features=features, decoder_input_ids=ids).logits for each in (reference, model)]
        found.update(logits[0][:, 1:], logits[1][:, 1:])  # the first token is given
    return found.result()


COLUMNS = {
    "candidate": "",
    "bits_per_weight": "bits per weight",
    "megabytes": "MB",
    "words_wrong": "words wrong",
    "words": "of",
    "kld": "KL divergence",
    "top1_agreement": "top-1",
    "seconds": "seconds",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", type=by_name, metavar="NAME", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = measure(chosen.schemes)
    print(tables.chosen_table(rows, COLUMNS))
    if chosen.output:
        chosen.output.write_text(json.dumps({"machine": machine(), "speech": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
