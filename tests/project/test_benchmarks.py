# SPDX-License-Identifier: Apache-2.0
"""The machinery of benchmarks/ and `octavo bench`: nothing is dropped silently, verdicts and tables follow the data."""

import contextlib
import io
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo import cli
from octavo.lab import bench

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import readme  # noqa: E402
import rivals  # noqa: E402
import roofline  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from limits import ceilings, ggml_types, small_ops  # noqa: E402
from suites import attention, float_ops, layers, low_bits, speech, whisper  # noqa: E402

TINY = layers.Plan(
    shapes=((64, 32),),
    batches=(1, 32),
    dtypes=("f32",),
    rivals=("fp32", "quantize_dynamic"),
    rounds=2,
    seconds=0.0,
)
CEILINGS = {
    "gops": {"avx2": 100.0, "avx512_vnni": 200.0, "scalar": 1.0},
    "read_gbs": {"1000": 50.0, "100000": 10.0},
    "copy_gbs": {"1000": 40.0, "100000": 9.0},
}


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "last_level_cache", lambda: 4096)
        measured, skipped = layers.measure_plan(TINY, CEILINGS)
    assert skipped == []
    return measured


def row(candidate: str, median: float, *, batch: int = 1, error: float = 0.01, **more) -> dict:
    cell = {"in_features": 8, "out_features": 4, "batch": batch, "dtype": "f32", "weights": "warm"}
    times = {"median_ms": median, "best_ms": median, "p10_ms": 0.95 * median, "p90_ms": 1.05 * median}
    fields = {"candidate": candidate, "isa": "", "as_accurate": True, "relative_error": error}
    return cell | fields | times | {"gops": 1.0, "share": 0.5} | more


def results(*rows: dict) -> dict:
    machine = {
        "cpu": "a CPU",
        "isas": ["avx2"],
        "active_isa": "avx2",
        "threads": 1,
        "python": "3",
        "malloc": "-",
    }
    machine |= {"octavo": "1", "commit": "abc", "caps": {}, "rivals": {"torch": "2"}}
    return {"schema": run.SCHEMA, "machine": machine, "skipped": [], "layers": list(rows)}


def test_a_result_is_a_line_for_each_row_and_reads_back():
    found = {**results(row("octavo", 0.123456789)), "memory": []}
    text = run.as_json(found)
    assert len(text.splitlines()) == 2 + len(found) + 2
    expected = {**found, "layers": [{**found["layers"][0], "median_ms": 0.123457, "best_ms": 0.123457}]}
    expected["layers"][0] |= {"p10_ms": 0.117284, "p90_ms": 0.12963}
    assert json.loads(text) == expected


# --- measuring ------------------------------------------------------------------------------------------------------


def test_every_cell_has_every_candidate_on_every_isa(rows):
    cells = {tables.cell_of(row)[2:] for row in rows}
    assert cells == {(1, "f32", "warm"), (32, "f32", "warm"), (1, "f32", "cold")}  # cold ends at 16 rows
    warm = [row for row in rows if row["weights"] == "warm" and row["batch"] == 1]
    assert {row["isa"] for row in warm if row["candidate"] == "octavo Int8Dynamic"} == set(layers.isas())
    rival_names = {row["candidate"] for row in warm if not row["candidate"].startswith("octavo")}
    assert "torch fp32" in rival_names and "quantize_dynamic onednn" in rival_names


def test_beside_each_time_stands_its_error(rows):
    """torch fp32 is right to its own rounding of 64 products; 8 bits are not."""
    errors = {row["candidate"]: row["relative_error"] for row in rows if row["weights"] == "warm"}
    assert errors["torch fp32"] < 64 * 2**-24 < errors["octavo Int8Dynamic"]
    assert errors["octavo Int8WeightOnly"] < errors["octavo Int8Dynamic"]
    assert all(row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in rows)


def test_a_candidate_that_fails_is_kept_with_its_error():
    linear = bench.random_linear(8, 4)
    x = torch.randn(2, 8)
    candidates = [
        bench.LayerCandidate("returns nothing", lambda x: x[:0]),
        bench.LayerCandidate("is right", linear),
        bench.LayerCandidate("raises", lambda x: 1 / 0),
    ]
    found = bench.measure_candidates(candidates, x, bench.exact_linear(linear, x), rounds=1, seconds=0)
    assert [measured.candidate for measured in found] == [candidate.name for candidate in candidates]
    assert found[0].times is None and "approximation has shape (0, 8), reference (2, 4)" in found[0].failure
    assert found[1].times is not None and found[1].failure == ""
    assert found[2].times is None and found[2].failure == "ZeroDivisionError: division by zero"


def test_a_rival_that_cannot_be_built_is_kept_with_its_error():
    def build(linear):
        raise ImportError("no such kernel")

    candidate = layers.candidate_of(rivals.Rival("broken", build, True), bench.random_linear(8, 4))
    with pytest.raises(RuntimeError, match="cannot be built: ImportError: no such kernel"):
        candidate.run(torch.randn(1, 8))


def test_cold_weights_come_in_turn():
    calls = []
    run_all = layers.rotating([lambda x, i=i: calls.append(i) for i in range(3)])
    for _ in range(5):
        run_all(None)
    assert calls == [0, 1, 2, 0, 1]


def test_building_a_rival_leaves_the_layer_as_it_is():
    linear = bench.random_linear(32, 16, torch.bfloat16)
    before = linear.weight.clone()
    for rival in rivals.available(["torch_float", "quantize_dynamic", "int_mm"])[0]:
        if rival.takes(torch.bfloat16, 1):
            y = rival.build(linear)(torch.randn(3, 32).bfloat16())
            assert y.shape == (3, 16) and y.dtype == torch.bfloat16, rival.name
    assert linear.weight.dtype == torch.bfloat16 and torch.equal(linear.weight, before)


def test_a_rival_that_is_not_installed_is_skipped_with_a_line(monkeypatch):
    monkeypatch.setattr(rivals, "is_installed", lambda package: package == "torch")
    found, skipped = rivals.available()
    assert {rival.name for rival in found} >= {"torch fp32", "quantize_dynamic", "int_mm"}
    assert [line.partition(":")[0] for line in skipped] == [
        "bitsandbytes",
        "onnxruntime",
        "openvino",
        "quanto",
        "torchao",
    ]
    assert "onnxruntime, onnx not installed (pip install -r requirements-bench.txt)" in skipped[1]


def test_small_operators_are_held_against_copies_of_the_same_bytes():
    found = small_ops.measure({"tiny": 256}, rounds=1)
    assert len(found) == 3 * 2 * 2
    assert {row["bytes"] for row in found if row["operator"] == "quantize" and row["dtype"] == "f32"} == {
        256 * 5
    }
    assert all(row["copy_ratio"] > 0 and row["fresh_copy_ratio"] > 0 for row in found)


def test_float_operators_are_held_against_torchs():
    found = float_ops.measure((lambda: float_ops.activations(256), float_ops.ropes), rounds=1)
    assert [row["operator"] for row in found] == ["gelu", "gelu_tanh", "silu", "silu_mul", "rope", "rope"]
    assert all(row["median_ms"] > 0 and row["speedup_over_torch"] > 0 for row in found)


def test_attention_is_held_against_torchs_in_time_and_error():
    encoder, decoder = (
        attention.Shape("encoder", 1, 2, 2, 16, 16, 16, causal=True),
        attention.Shape("decoder", 1, 4, 2, 1, 16, 16),
    )
    found = attention.measure((encoder, decoder), rounds=1)
    assert {row["shape"] for row in found} == {"encoder", "decoder"}
    for row in found:
        # q, k, weights, v and the result; 16 products. Half a step of int8 codes is 2^-8 of a row's largest.
        rounded = 2**-24 if "float32" in row["candidate"] else 2**-8
        assert row["error"] < (5 + 16) * rounded
        assert row["torch_ratio"] > 0 and ("gbs" in row) == (row["shape"] == "decoder")


def test_few_bits_stand_beside_rivals_with_errors_on_two_kinds_of_weights():
    names = ("torch fp32", "torch int4pack g32", "octavo Int8Dynamic", "octavo Int8WeightOnly")
    plan = low_bits.Plan(((64, 32),), (2,), names, rounds=1, seconds=0, memory=False)
    found, _ = low_bits.measure_plan(plan)
    assert {row["candidate"] for row in found} == set(names)
    errors = {row["candidate"]: (row["relative_error"], row["gaussian_error"]) for row in found}
    for exact, eight, four in zip(*(errors[names[i]] for i in (0, 2, 1)), strict=True):
        assert exact < 64 * 2**-24 < eight < four
    assert "| 64 -> 32, 2 rows, best ms |" in low_bits.page(found)


def test_a_rival_of_few_bits_is_ahead_of_what_is_as_accurate_only():
    rows = [
        row("octavo four bits", 2.0, error=0.1),
        row("octavo eight bits", 3.0, error=0.01),
        row("four bits", 1.0, error=0.1),
        row("three bits", 2.5, error=0.2),  # slower than four bits of ours
        row("eight bits", 2.5, error=0.01),
        row("worse", 1.0, error=0.005),  # nothing of ours is as accurate
    ]
    assert [line.split(" | ")[2:4] for line in low_bits.ahead(rows).splitlines()[4:]] == [
        ["four bits", "0.50"],
        ["eight bits", "0.83"],
    ]


def test_words_wrong_are_those_to_change_add_or_take_away():
    for found, wrong in [
        ("One two three.", 0),
        ("one, two", 1),
        ("one too three", 1),
        ("zero one two three", 1),
        ("", 3),
    ]:
        assert speech.words_wrong("One, two three", found) == wrong


def test_a_file_of_ctranslate2_is_read_with_its_aliases():
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    half = torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.float16)
    tensor = text("a/weight") + struct.pack("<B2IBI", 2, 1, 3, 4, 6) + half.numpy().tobytes()
    file = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1) + tensor
    found = whisper.read(io.BytesIO(file + struct.pack("<I", 1) + text("b/weight") + text("a/weight")))
    assert list(found) == ["a/weight", "b/weight"] and found["b/weight"] is found["a/weight"]
    assert torch.equal(found["a/weight"], half.float())


# --- ceilings -------------------------------------------------------------------------------------------------------


def test_the_roofline_is_the_slower_of_products_and_weights():
    bound = ceilings.fastest_seconds
    # 800 weights: 50 GB/s where they fit, 10 GB/s from memory; 2 * 800 operations for each row at 100 GOPS.
    assert bound(CEILINGS, "avx2", (40, 20), 1, False) == pytest.approx(max(1600 / 100e9, 800 / 50e9))
    assert bound(CEILINGS, "avx2", (40, 20), 1, True) == pytest.approx(800 / 10e9)
    assert bound(CEILINGS, "avx2", (40, 20), 1000, True) == pytest.approx(1_600_000 / 100e9)
    assert bound(CEILINGS, "avx2", (4000, 200), 1, False) == pytest.approx(800_000 / 10e9)  # fits nowhere


def test_without_a_compiler_there_are_no_ceilings_and_a_reason(monkeypatch, capsys):
    def no_cmake():
        raise FileNotFoundError("no cmake")

    monkeypatch.setattr(ceilings, "build", no_cmake)
    assert ceilings.measure(1) == {}
    assert "ceilings: not measured: no cmake" in capsys.readouterr().err


# --- reports --------------------------------------------------------------------------------------------------------


def test_every_rival_that_is_ahead_is_listed_by_accuracy():
    mine = [
        row("octavo Int8Dynamic", 2.0, isa="avx2"),
        row("octavo Int8Dynamic", 1.0, isa="avx512_vnni"),
        row("octavo Int8WeightOnly", 0.1),
        row("as accurate", 0.8),
        row("says so, but saturates", 0.7, error=0.05),
        row("less accurate", 0.98, as_accurate=False),
        row("behind", 1.5),
    ]
    text = tables.ahead_section(mine)
    accurate, less = text.split("Less accurate")
    assert "| as accurate | 0.80 | apart | 1 |" in accurate and "behind" not in text and "octavo" not in text
    assert "says so" not in accurate and "| says so, but saturates | 0.70 | apart | 5 |" in less
    assert "| less accurate | 0.98 | overlap |" in less


def test_a_report_names_the_machine_the_failures_and_the_skipped():
    failed = {key: value for key, value in row("broken", 1.0).items() if not key.endswith("_ms")}
    found = results(
        row("octavo Int8Dynamic", 1.0), row("torch fp32", 2.0), failed | {"failure": "RuntimeError: no"}
    )
    text = tables.report(found | {"skipped": ["quanto: not installed"], "ceilings": CEILINGS})
    for expected in (
        "a CPU",
        "octavo 1 at abc",
        "**1 (2x)**",
        "- broken: RuntimeError: no",
        "- quanto: not installed",
    ):
        assert expected in text, expected


def test_rows_move_only_beyond_their_spread():
    old = results(*(row(f"octavo {name}", 1.0) for name in ("faster", "slower", "same")), row("fp32", 1.0))
    new = results(
        row("octavo faster", 0.8),
        row("octavo slower", 1.2),
        row("octavo same", 1.05),  # 0.9975 .. 1.1025 overlaps 0.95 .. 1.05
        row("fp32", 1.0),
        row("only in the new file", 1.0),
    )
    verdicts = {dict(change.key)["candidate"]: change.verdict for change in compare.changes(old, new)}
    assert verdicts == {"octavo faster": "faster", "octavo slower": "slower", "octavo same": "", "fp32": ""}
    text = compare.report(old, new)
    assert "2 of 4 rows moved" in text and "rivals, the control: new / old 1.000" in text


def test_two_runs_of_the_same_code_do_not_move_within_the_margin():
    exact = {"p10_ms": 1.0, "p90_ms": 1.0}
    old, new = results(row("octavo", 1.0, **exact)), results(row("octavo", 1.01, p10_ms=1.01, p90_ms=1.01))
    assert [change.verdict for change in compare.changes(old, new)] == [""]


@pytest.mark.parametrize("document", readme.DOCUMENTS, ids=lambda path: path.name)
def test_a_document_shows_the_committed_results(document):
    text = document.read_text()
    assert readme.written(text, readme.RESULTS) == text, "run python benchmarks/readme.py"


def test_tables_between_markers_are_made_anew(tmp_path):
    found = results(row("octavo Int8Dynamic", 1.0), row("torch fp32", 3.0))
    (tmp_path / "cpu-1.json").write_text(json.dumps(found))
    text = "before\n<!-- benchmarks: layers cpu-1 -->\nold\n<!-- end -->\nafter"
    new = readme.written(text, tmp_path)
    assert "old" not in new and "| 8 x 4 | 1 | 1 | 50% | 3.00 |" in new
    assert new.startswith("before\n<!-- benchmarks: layers cpu-1 -->\n") and new.endswith(
        "<!-- end -->\nafter"
    )
    assert readme.written(new, tmp_path) == new
    with pytest.raises(ValueError, match="there is no table 'speed'"):
        readme.written(text.replace("layers", "speed"), tmp_path)


def test_divergences_stand_in_two_columns_without_the_float_model():
    klds = {"fp32": 0.0, "b": 2e-6, "c": 3e-6, "a": 1e-6}
    rows = [{"name": name, "kld": kld, "scheme": {"name": name} if kld else {}} for name, kld in klds.items()]
    assert tables.divergences(rows).splitlines()[2:] == ["| `a` | 1 |  | `c` | 3 |", "| `b` | 2 |  |  |  |"]


def test_a_picture_is_drawn_of_layers_and_ceilings(tmp_path, rows):
    pytest.importorskip("matplotlib")
    found = results(*rows)
    assert not roofline.plot(found, tmp_path / "none.png")  # no ceilings
    assert roofline.plot(found | {"ceilings": CEILINGS}, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


# --- command lines --------------------------------------------------------------------------------------------------


def test_a_part_of_the_layers_can_be_run():
    chosen = run.arguments(
        ["layers", "--quick", "--shapes", "8x4,16x32", "--batches", "1,2", "--rivals", "fp32"]
    )
    plan = run.plan_of(chosen)
    assert plan.shapes == ((8, 4), (16, 32)) and plan.batches == (1, 2) and plan.rivals == ("fp32",)
    assert plan.rounds == layers.QUICK.rounds
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        run.arguments(["flying"])


@pytest.mark.parametrize("as_json", [False, True])
def test_octavo_bench_prints_a_table_or_json(monkeypatch, capsys, as_json):
    measure = bench.bench
    monkeypatch.setattr(bench, "bench", lambda **options: measure([(64, 32)], [1, 2], **options))
    assert cli.main(["bench", "--rounds", "1", *(["--json"] if as_json else [])]) == 0
    printed = capsys.readouterr().out
    if as_json:
        found = json.loads(printed)
        assert found["machine"]["active_isa"] == octavo.cpu_info().active
        assert [layer["batch"] for layer in found["layers"]] == [1, 2]
        assert len(found["layers"][0]["measurements"]) == 4
    else:
        assert "64 x 32" in printed and "Int8WeightOnly" in printed and octavo.cpu_info().active in printed


def test_every_type_of_ggml_is_a_row_and_more_bits_of_a_family_leave_less_error():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    types = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    found = [ggml_types.row_of(type, weight, rounds=1) for type in types]
    errors = [each["relative_error"] for each in found]
    assert errors == sorted(errors, reverse=True)
    text = ggml_types.table(found)
    assert all(f"| {type} |" in text for type in types)
