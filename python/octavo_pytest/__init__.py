# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin of Octavo: the fixture `octavo_accuracy`.

pytest imports this wherever Octavo is installed, so it is no part of the package `octavo`, whose import brings torch:
that happens when a test asks for the fixture.
"""

from __future__ import annotations

from typing import Any, Protocol

import pytest


class Accuracy(Protocol):
    """What the fixture gives: `octavo.evaluate` and `Evaluation.assert_close` in one call."""

    def __call__(
        self,
        reference: Any,
        model: Any,
        data: Any,
        *,
        kind: str = "auto",
        prompts: Any = None,
        **limits: float,
    ) -> Any: ...


@pytest.fixture
def octavo_accuracy(record_property: Any) -> Accuracy:
    """A function that compares a quantized model with its reference and fails the test if a limit is missed.

        def test_accuracy(octavo_accuracy):
            model = octavo.quantized(reference, octavo.Int8Dynamic())
            octavo_accuracy(reference, model, batches, kld=0.01, top1_agreement=0.95)

    The first five arguments are those of `octavo.evaluate`, limits those of `Evaluation.assert_close`; sizes
    (bytes_on_disk, bytes_in_memory, bits_per_weight) are measured if they are limited. Returns the Evaluation; what was
    limited is also in the JUnit report as octavo_kld and the like.
    """
    import octavo
    from octavo.evaluation.figures import FIGURES

    def check(
        reference: Any, model: Any, data: Any, *, kind: str = "auto", prompts: Any = None, **limits: float
    ) -> Any:
        limited = [FIGURES[name] for name in limits if name in FIGURES]
        resources = ("size",) if any(figure.path.startswith("resources") for figure in limited) else ()
        result = octavo.evaluate(reference, model, data, kind=kind, prompts=prompts, resources=resources)
        for figure in limited:
            record_property(f"octavo_{figure.name}", figure.value(result))
        __tracebackhide__ = True  # the failure is the user's line, not this one
        result.assert_close(**limits)
        return result

    return check
