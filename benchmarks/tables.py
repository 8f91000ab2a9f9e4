# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: one table for each layer, and every cell where a rival is ahead."""

from __future__ import annotations

import importlib
from typing import Any

Row = dict[str, Any]
Cell = tuple[int, int, int, str, str]

OURS = "octavo "
# A rival counts as accurate if it promises to be and its error stays within this many times ours: oneDNN saturates
# under AVX2 whatever the layer above it promises.
ERROR_MARGIN = 1.5
TITLES = {
    "attention": "Attention against torch's scaled_dot_product_attention",
    "small_ops": "Quantize, dequantize, choose_qparams against copies of the same bytes",
    "float_ops": "Activations, norms and rotary embeddings against torch",
    "overhead": "Call overhead, a 64 x 64 layer with one row",
    "startup": "Before the first output",
    "encoder": "all-MiniLM-L6-v2, only its Linears swapped",
    "decoder": "A Llama-like decoder, only its Linears swapped",
    "memory": "Memory",
    "fusion": "Encoders after octavo.fuse_",
    "low_bits": "Few bits, and groups",
    "ggml_types": "Types of GGML",
    "decoding": "A Llama-like decoder after octavo.fuse_ and with octavo.nn.KVCache",
}


def report(results: dict[str, Any]) -> str:
    """The whole Markdown page."""
    machine = results["machine"]
    parts = [f"# Benchmarks on {machine['cpu']}", machine_lines(machine)]
    if results.get("ceilings"):
        parts.append(ceilings_section(results["ceilings"]))
    parts += [section(name, results) for name in results if is_rows(results[name])]
    if results["skipped"]:
        parts.append("## Skipped\n\n" + "\n".join(f"- {line}" for line in results["skipped"]))
    return "\n\n".join(parts) + "\n"


def is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def machine_lines(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["rivals"].items())
    caps = ", ".join(f"{name}={value}" for name, value in machine["caps"].items())
    return "\n".join(
        [
            f"- instruction set {machine['active_isa']} (of {', '.join(machine['isas'])}), "
            f"threads {machine['threads']}, Python {machine['python']}, malloc {machine['malloc']}",
            f"- octavo {machine['octavo']} at {machine['commit']}; {versions}",
            f"- caps: {caps or 'none'}",
        ]
    )


def section(name: str, results: dict[str, Any]) -> str:
    rows = results[name]
    if name == "layers":
        return layers_section(rows)
    if name == "low_bits":
        return f"## {TITLES[name]}\n\n{importlib.import_module(f'suites.{name}').page(rows)}"
    return f"## {TITLES.get(name, name)}\n\n{plain_table(rows)}"


def plain_table(rows: list[Row]) -> str:
    """Rows as they are; a column that only some rows have stays empty in the others."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[figure(row.get(column, "")) for column in columns] for row in rows]
    return table(columns, cells)


def chosen_table(rows: list[Row], columns: dict[str, str]) -> str:
    """Some columns of the rows: {name in the rows: heading}. Cosines have five digits: they differ in the last ones."""

    def cell(row: Row, column: str) -> str:
        return f"{row[column]:.5f}" if column == "cosine" else figure(row.get(column, ""))

    return table(list(columns.values()), [[cell(row, column) for column in columns] for row in rows])


def divergences(rows: list[Row]) -> str:
    """Of a study's rows the schemes' KL divergences, in millionths of a nat, the least first, in two columns."""
    schemes = sorted((row for row in rows if row["scheme"]), key=lambda row: row["kld"])
    cells = [[f"`{row['name']}`", f"{1e6 * row['kld']:.0f}"] for row in schemes]
    half = (len(cells) + 1) // 2
    right = [*cells[half:], ["", ""]]
    columns = ["scheme", "KLD", "", "scheme", "KLD"]
    return table(columns, [[*cells[i], "", *right[i]] for i in range(half)])


def table(columns: list[str], cells: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- layers ---------------------------------------------------------------------------------------------------------


def cell_of(row: Row) -> Cell:
    return (row["in_features"], row["out_features"], row["batch"], row["dtype"], row["weights"])


def name_of(row: Row) -> str:
    return f"{row['candidate']}, {row['isa']}" if row["isa"] else row["candidate"]


def layers_section(rows: list[Row]) -> str:
    parts = [
        "## Layers\n\nMedian milliseconds, in brackets how many times as fast as torch fp32; bold: the fastest of "
        "the column. Error: relative to float64, the largest of the row."
    ]
    for key in dict.fromkeys(
        (row["in_features"], row["out_features"], row["dtype"], row["weights"]) for row in rows
    ):
        in_features, out_features, dtype, weights = key
        mine = [row for row in rows if (cell_of(row)[:2], cell_of(row)[3:]) == (key[:2], key[2:])]
        parts.append(f"### {in_features} x {out_features}, {dtype}, weights {weights}\n\n{layer_table(mine)}")
    parts.append(ahead_section(rows))
    return "\n\n".join(parts)


def layer_table(rows: list[Row]) -> str:
    batches = sorted({row["batch"] for row in rows})
    medians = {(name_of(row), row["batch"]): row.get("median_ms") for row in rows}
    fastest = {
        batch: min((ms for (_, other), ms in medians.items() if ms and other == batch), default=0)
        for batch in batches
    }
    cells = []
    for name in sorted(dict.fromkeys(map(name_of, rows)), key=rank):
        errors = [row["relative_error"] for row in rows if name_of(row) == name and "relative_error" in row]
        line = [name, f"{max(errors):.1e}" if errors else ""]
        for batch in batches:
            median, fp32 = medians.get((name, batch)), medians.get(("torch fp32", batch))
            text = "" if (name, batch) not in medians else "failed"
            if median:
                text = figure(median) + (f" ({fp32 / median:.2g}x)" if fp32 else "")
            line.append(f"**{text}**" if median and median == fastest[batch] else text)
        cells.append(line)
    return table(["candidate", "error", *(f"{batch} rows" for batch in batches)], cells) + failures(rows)


def rank(name: str) -> int:
    """Ours first, then the yardstick, then the others in their order."""
    return 0 if name.startswith(OURS) else 1 if name == "torch fp32" else 2


def failures(rows: list[Row]) -> str:
    found = dict.fromkeys(f"- {name_of(row)}: {row['failure']}" for row in rows if "failure" in row)
    return "\n\nFailed:\n" + "\n".join(found) if found else ""


def our_row(rows: list[Row]) -> Row | None:
    """Of one cell: Int8Dynamic on its fastest instruction set."""
    ours = [row for row in rows if row["candidate"] == OURS + "Int8Dynamic" and "median_ms" in row]
    return min(ours, key=lambda row: row["median_ms"], default=None)


def rivals_of(rows: list[Row], accurate: bool | None = None) -> list[Row]:
    """Of one cell, the fastest first: {candidate, ratio: its median over ours, error_ratio, apart: the ranges that 8 of
    10 rounds stayed within do not overlap, as_accurate}. accurate None: all."""
    ours = our_row(rows)
    if ours is None:
        return []
    found = [
        {
            "candidate": row["candidate"],
            "ratio": row["median_ms"] / ours["median_ms"],
            "error_ratio": row["relative_error"] / ours["relative_error"],
            "apart": row["p10_ms"] > ours["p90_ms"] or row["p90_ms"] < ours["p10_ms"],
            "as_accurate": row["as_accurate"]
            and row["relative_error"] <= ERROR_MARGIN * ours["relative_error"],
        }
        for row in rows
        if not row["candidate"].startswith(OURS) and "median_ms" in row
    ]
    return sorted(
        (rival for rival in found if accurate is None or rival["as_accurate"] == accurate),
        key=lambda rival: rival["ratio"],
    )


def cells_of(rows: list[Row]) -> dict[Cell, list[Row]]:
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault(cell_of(row), []).append(row)
    return found


def ahead_section(rows: list[Row]) -> str:
    """Where a rival is ahead of Int8Dynamic: first those at least as accurate, then the others."""
    parts = ["### Where a rival is ahead of Int8Dynamic"]
    columns = ["layer", "rows", "dtype", "weights", "rival", "its time / ours", "spreads", "its error / ours"]
    for accurate, title in ((True, "At least as accurate"), (False, "Less accurate")):
        cells = [
            [f"{cell[0]} x {cell[1]}", str(cell[2]), *cell[3:], rival["candidate"], f"{rival['ratio']:.2f}"]
            + ["apart" if rival["apart"] else "overlap", figure(rival["error_ratio"])]
            for cell, mine in cells_of(rows).items()
            for rival in rivals_of(mine, accurate)
            if rival["ratio"] < 1
        ]
        parts.append(f"{title}: " + (f"\n\n{table(columns, cells)}" if cells else "nowhere."))
    return "\n\n".join(parts)


def layer_summary(rows: list[Row]) -> str:
    """For the README, one line for each cell: our time, and how many times as long the others take."""
    lines = []
    for cell, mine in cells_of(rows).items():
        ours = our_row(mine)
        if ours is None:
            continue
        ratios = {rival["candidate"]: f"{rival['ratio']:.2f}" for rival in rivals_of(mine)}
        best = [
            f"{rival['ratio']:.2f} {rival['candidate']}"
            for accurate in (True, False)
            for rival in rivals_of(mine, accurate)[:1]
        ]
        share = f"{ours['share']:.0%}" if "share" in ours else ""
        names = ("torch fp32", "quantize_dynamic")
        lines.append(
            [f"{cell[0]} x {cell[1]}", str(cell[2]), figure(ours["median_ms"]), share]
            + [ratios.get(name, "") for name in names]
            + (best + ["", ""])[:2]
        )
    columns = ["layer", "rows", "Int8Dynamic ms", "of the ceiling", "torch fp32", "quantize_dynamic"]
    return table([*columns, "fastest as accurate", "fastest of the others"], lines)


def speedups(rows: list[Row]) -> str:
    """For the README, a line for each layer, warm and float32: how many times as long torch fp32 and quantize_dynamic
    take as Int8Dynamic."""
    cells = {key: mine for key, mine in cells_of(rows).items() if key[3:] == ("f32", "warm")}
    batches = sorted({key[2] for key in cells})
    lines = []
    for shape in dict.fromkeys(key[:2] for key in cells):
        line = [f"{shape[0]} x {shape[1]}"]
        for batch in batches:
            found = {
                rival["candidate"]: rival["ratio"]
                for rival in rivals_of(cells.get((*shape, batch, "f32", "warm"), []))
            }
            pair = [f"{found[name]:.3g}" for name in ("torch fp32", "quantize_dynamic") if name in found]
            line.append(" / ".join(pair))
        lines.append(line)
    return table(["layer", *(f"{batch} rows" for batch in batches)], lines)


def ceilings_section(ceilings: dict[str, Any]) -> str:
    isas = [[isa, figure(gops)] for isa, gops in ceilings["gops"].items()]
    sizes = [
        [f"{int(size) / 2**20:g} MB", figure(gbs), figure(ceilings["copy_gbs"][size])]
        for size, gbs in ceilings["read_gbs"].items()
    ]
    floats = [[isa, figure(gflops)] for isa, gflops in ceilings.get("gflops", {}).items()]
    tables = [table(["instruction set", "int8 GOPS, registers only"], isas)]
    if floats:  # older results have none
        tables.append(table(["instruction set", "float GFLOPS, registers only"], floats))
    tables.append(table(["of", "read GB/s", "memcpy GB/s (read + written)"], sizes))
    return "## What the machine can do\n\n" + "\n\n".join(tables)
