# SPDX-License-Identifier: Apache-2.0
"""The behaviour table: data on which int8 linear layers of other packages go wrong, and what a scheme does with it.

`measure(scheme)` gives one row of the table for the active instruction set; `python tests/support/behaviour.py` prints
all rows as Markdown, for the docs. Errors are max |error| / max |expected| against float64, as in the peers' rows.
test_behaviour.py holds every scheme to what the table should say.
"""

import torch
from models import variants
from torch import nn

import octavo

BAD_ROW = 3  # the row, or output, that holds NaN, Inf, zeros or an outlier


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A float layer with these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


def layer_and_input(n: int = 96, k: int = 512, m: int = 16) -> tuple[nn.Linear, torch.Tensor]:
    return linear(random(n, k, seed=1), random(n, seed=2)), random(m, k, seed=3)


def same_sign(k: int = 4096) -> tuple[nn.Linear, torch.Tensor]:
    """x all +1, weight rows all +1 or all -1: the largest sums of one sign."""
    rows = signs(48, seed=4)[:, None].expand(48, k)
    return linear(rows), torch.ones(4, k)


def sign_matched(k: int = 4096) -> tuple[nn.Linear, torch.Tensor]:
    """x random +1 and -1 in equal pairs, weight rows +x or -x: both ends of every range, and saturating pairs."""
    x = signs(k // 2, seed=5).repeat_interleave(2)
    return linear(signs(48, seed=6)[:, None] * x), x.expand(4, k)


def big_k() -> tuple[nn.Linear, torch.Tensor]:
    """More k than int32 holds for uint8 x int8, all ones."""
    return linear(torch.ones(20, 67584)), torch.ones(3, 67584)


def zero_row() -> tuple[nn.Linear, torch.Tensor]:
    layer, x = layer_and_input()
    return layer, replace_row(x, 0.0)


def outlier_weight_row() -> tuple[nn.Linear, torch.Tensor]:
    layer, x = layer_and_input()
    layer.weight[BAD_ROW] *= 1000
    return layer, x


def replace_row(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[BAD_ROW] = value
    return x


def replace_element(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[BAD_ROW, 5] = value
    return x


def outlier_row(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[BAD_ROW] *= 1000
    return x


def others(y: torch.Tensor) -> torch.Tensor:
    """All rows but the bad one."""
    return torch.cat([y[:BAD_ROW], y[BAD_ROW + 1 :]])


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The float layer in float64."""
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


# --- the table ------------------------------------------------------------------------------------------------------


def error(y: torch.Tensor, expected: torch.Tensor) -> str:
    relative = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    return f"{relative:.2g}"


def same(a: torch.Tensor, b: torch.Tensor) -> str:
    return "same bits" if torch.equal(a, b) else "changed"


def row_kind(row: torch.Tensor) -> str:
    if row.isnan().all():
        return "nan"
    return "FINITE" if row.isfinite().all() else "mixed"


def measure(scheme: octavo.schemes.Scheme) -> dict[str, str]:
    """One row of the table: what `scheme` does with each kind of data."""

    def run(case: tuple[nn.Linear, torch.Tensor]) -> str:
        return error(octavo.quantized(case[0], scheme, data=case[1])(case[1]), exact(*case))

    layer, x = layer_and_input()
    fast = octavo.quantized(layer, scheme, data=x)
    y = fast(x)
    bad = {name: fast(replace_element(x, float(name))) for name in ("nan", "inf")}
    heavy, _ = outlier_weight_row()
    heavy_y = octavo.quantized(heavy, scheme, data=x)(x)
    odd_layer, odd_x = layer_and_input(n=129, k=383)
    return {
        "random": error(y, exact(layer, x)),
        "sat_same": run(same_sign()),
        "sat_sign": run(sign_matched()),
        "sat_bigK": run(big_k()),
        "nan": f"row:{row_kind(bad['nan'][BAD_ROW])} others:{same(others(bad['nan']), others(y))}",
        "inf": f"row:{row_kind(bad['inf'][BAD_ROW])} others:{same(others(bad['inf']), others(y))}",
        "zero_row": error(fast(replace_row(x, 0.0))[BAD_ROW], layer.bias.double()),
        "all_zero": error(fast(torch.zeros_like(x))[0], layer.bias.double()),
        "outlier_row": same(others(fast(outlier_row(x))), others(y)),
        "outlier_wrow": same(others(heavy_y.T), others(y.T)),
        "batch_invariant": "yes" if torch.equal(fast(x[7:8]), y[7:8]) else "no",
        "odd_383x129": run((odd_layer, odd_x)),
        "empty": "ok" if fast(x[:0]).shape == (0, 96) else "wrong shape",
        "strided": same(fast(x.T.contiguous().T), y),
        "x3d": same(fast(x.reshape(2, 8, 512)).reshape(y.shape), y),
    }


def table(schemes: list[octavo.schemes.Scheme]) -> str:
    """The whole table as Markdown: one line for each instruction set of this CPU and each scheme."""
    lines: list[str] = []
    for isa in octavo.cpu_info().isas:
        for scheme in schemes:
            with octavo.use_isa(isa):
                row = {"scheme": repr(scheme), "isa": isa, **measure(scheme)}
            if not lines:
                lines += ["| " + " | ".join(row) + " |", "|" + "---|" * len(row)]
            lines.append("| " + " | ".join(row.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(variants()))
