# SPDX-License-Identifier: Apache-2.0
"""Real input for the demo without a download: sentences from Python's own docstrings, the language reference that
`help()` shows, scikit-learn's digits."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# These modules are written in Python, can be imported everywhere without side effects, and vary in subject.
MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "collections", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "email.message", "enum", "fnmatch", "fractions", "functools", "getpass",
    "gettext", "gzip", "heapq", "html.parser", "http.client", "http.cookiejar", "inspect", "io", "ipaddress",
    "json", "keyword", "linecache", "locale", "logging", "mailbox", "mimetypes", "numbers", "optparse", "os",
    "pathlib", "pickle", "platform", "pprint", "queue", "random", "sched", "secrets", "selectors", "shelve",
    "shlex", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "unittest.mock", "urllib.parse",
    "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip
PER_MODULE = 3


def docstring_sentences(count: int = 100) -> list[str]:
    """The first sentences of docstrings of public functions and classes of Python's standard library.

    At most 3 of a module, in the order of MODULES and of names: the same list for the same Python version.
    Raises: ValueError if there are not `count` of them (docstrings are stripped under python -OO).
    """
    sentences: list[str] = []
    for name in MODULES:
        new = [s for s in dict.fromkeys(_first_sentences(name)) if s not in sentences]
        sentences += new[:PER_MODULE]
    if len(sentences) < count:
        raise ValueError(f"docstring_sentences: {len(sentences)} sentences found, count is {count}")
    # Spread over all modules, rather than the first ones in the alphabet.
    return [sentences[i * len(sentences) // count] for i in range(count)]


def _first_sentences(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    found = []
    for name, value in sorted(vars(module).items()):
        own = getattr(value, "__module__", None) == module_name
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            paragraph = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            sentence = re.split(r"(?<=\.)\s", paragraph)[0]
            # A sentence of prose has a capital, a full stop and some words, and no code.
            if re.fullmatch(r"[A-Z][^<>{}=*`]+\.", sentence) and 6 <= len(sentence.split()) <= 60:
                found.append(sentence)
    return found


def documentation_windows(tokenizer: Any, windows: int = 24, context: int = 128) -> torch.Tensor:
    """Running text of the language reference that Python's `help()` shows: int64 [windows, context + 1], token ids.

    The first `context` tokens of a row are input, the last `context` are what is to be predicted; windows lie evenly
    spread over the text, which is the same for the same Python version.
    Raises: ImportError if this Python was installed without its documentation, ValueError if the windows would overlap.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python has no pydoc_data, from which the text comes; use one installed with it"
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = context + 1
    if windows < 1 or windows * length > len(ids):
        raise ValueError(f"documentation_windows: windows is {windows}; from 1 to {len(ids) // length} fit")
    starts = torch.arange(windows) * ((len(ids) - length) // max(windows - 1, 1))
    return ids[starts[:, None] + torch.arange(length)]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 images of handwritten digits: x [images, 64] in 0 .. 1, labels [images]."""

    train_x: torch.Tensor
    train_labels: torch.Tensor
    test_x: torch.Tensor
    test_labels: torch.Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that `model` [.., 64] -> [.., 10] classifies right."""
        with torch.inference_mode():
            return (model(self.test_x).argmax(-1) == self.test_labels).float().mean().item()


def load_digits(seed: int = 0) -> Digits:
    """1,257 images to train and 540 to test, split by `seed`. Raises: ImportError without scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1257], order[1257:]
    return Digits(x[train], y[train], x[test], y[test])


def train_digit_classifier(digits: Digits, epochs: int = 30, seed: int = 0) -> nn.Module:
    """A 64-128-128-10 perceptron trained for some seconds; the same for the same seed and torch."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not used up
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.train_x)).split(64):
                loss = nn.functional.cross_entropy(model(digits.train_x[batch]), digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()
