# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: breaks the core in one place at a time and expects the ctest programs to fail.

Usage: python tools/mutate.py [build folder]. Each mutation is a line of source replaced in a copy of the tree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    why: str
    file: str
    old: str
    new: str
    isa: str = "scalar"  # the mutation shows only where this instruction set is tested


MUTATIONS = [
    Mutation(
        "scalar forgets the zero point",
        "isa/integer/scalar.cpp",
        "e.acc[i * e.acc_stride + j] - e.rows[i].zero_point * column_sum",
        "e.acc[i * e.acc_stride + j]",
    ),
    Mutation(
        "scalar rounds bf16 down",
        "isa/common/half.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "bits >> 16",
        "avx2",
    ),
    Mutation(
        "avx2 adds with 16-bit saturation",
        "isa/integer/avx2.cpp",
        "vpaddd %1, %0, %0",
        "vpaddsw %1, %0, %0",
        "avx2",
    ),
    Mutation(
        "avx2 loses the order of columns",
        "isa/integer/avx2.cpp",
        "acc[r][q + 1]), 0xd8)",
        "acc[r][q + 1]), 0xe4)",
        "avx2",
    ),
    Mutation(
        "avx512 swaps signed and unsigned",
        "isa/integer/avx512_vnni.cpp",
        "vpdpbusd %2, %1, %0",
        "vpdpbusd %1, %2, %0",
        "avx512_vnni",
    ),
    Mutation(
        "avx512 truncates when it quantizes",
        "isa/integer/bytes_avx512.h",
        "_mm512_cvtps_epi32(numbers[2 * v].lanes)",
        "_mm512_cvttps_epi32(numbers[2 * v].lanes)",
        "avx512_vnni",
    ),
    Mutation(
        "avx512 multiplies and adds separately",
        "isa/integer/epilogue_avx512.h",
        "_mm512_fmadd_ps(t, _mm512_mul_ps(row_scale, scale[v]), bias[v])",
        "_mm512_add_ps(_mm512_mul_ps(t, _mm512_mul_ps(row_scale, scale[v])), bias[v])",
        "avx512_vnni",
    ),
    Mutation(
        "avx512 takes the first row's zero point for all, from registers",
        "isa/integer/epilogue_avx512.h",
        "if (e.rows[r].zero_point != zero_point) {",
        "if (false) {",
        "avx512_vnni",
    ),
    Mutation(
        "codes are stored past the end of a row",
        "isa/integer/rows.h",
        "if (count >= 64) return bytes.store_bytes(to);",
        "return bytes.store_bytes(to);",
        "avx2",
    ),
    Mutation(
        "avx_vnni drops a partial sum",
        "isa/integer/avx_vnni.cpp",
        "int c = 1; c < kChains",
        "int c = 2; c < kChains",
        "avx_vnni",
    ),
    Mutation(
        "amx writes a product into the wrong tile",
        "isa/integer/amx_int8.cpp",
        "_tile_dpbusd(3, 6, 7)",
        "_tile_dpbusd(2, 6, 7)",
        "amx_int8",
    ),
    Mutation("amx forgets to zero a tile", "isa/integer/amx_int8.cpp", "  _tile_zero(4);\n", "", "amx_int8"),
    Mutation(
        "rows take the scale of the first row",
        "drivers/linear.cpp",
        "e.rows = qparams + tile.row;",
        "e.rows = qparams;",
    ),
    Mutation(
        "an integer bias is subtracted",
        "drivers/linear.cpp",
        "std::int64_t{weight.column_sum[j]} - bias",
        "std::int64_t{weight.column_sum[j]} + bias",
    ),
    Mutation(
        "an integer bias may leave int32",
        "drivers/linear.cpp",
        "require(largest <= room",
        "require(largest <= 2 * room",
    ),
    Mutation(
        "a row with NaN is quantized",
        "drivers/row.h",
        "    if (!std::isfinite(range.max)) return clear(1);\n",
        "",
    ),
    Mutation(
        "a static row with NaN is quantized",
        "drivers/row.h",
        "return kernel.quantize_row(row) ? qparams : kNotFinite;",
        "kernel.quantize_row(row);\n    return qparams;",
    ),
    Mutation(
        "the tall tile drops its eighth row",
        "isa/integer/avx512_vnni.cpp",
        "default: return multiply_rows<8>",
        "default: return multiply_rows<7>",
        "avx512_vnni",
    ),
    Mutation(
        "k beyond int32 is not split",
        "drivers/linear.cpp",
        "if (walk.block.k > walk.block.exact_k()) {",
        "if (false) {",
    ),
    Mutation(
        "a thread skips its last tile",
        "drivers/tiles.h",
        "row < rows.end; ++row",
        "row < rows.end - (rows.end > 8); ++row",
    ),
    Mutation(
        "attention does not rescale what earlier blocks summed up",
        "isa/float/attention/softmax.h",
        "  if (*row.largest > -kInfinity && largest > *row.largest) rescale(row, largest, a.dimension);\n",
        "",
    ),
    Mutation(
        "attention shows the keys beyond the last one",
        "isa/float/attention/softmax.h",
        "if (count < 16) score = add_bias(score, bias_of_count(count));",
        "",
    ),
    Mutation(
        "products of codes keep the offset of keys",
        "isa/float/attention/attention_int8.h",
        "static_cast<std::int32_t>(-sum_of(",
        "static_cast<std::int32_t>(0.0f * sum_of(",
        "avx512_vnni",
    ),
    Mutation(
        "values of later blocks have no scale",
        "isa/float/attention/attention_int8.h",
        "for_near_rows(a, a.keys, ",
        "for_near_rows(a, a.keys < kBlockKeys ? a.keys : kBlockKeys, ",
    ),
    Mutation(
        "weights as codes are cut off",
        "isa/float/attention/attention_int8.h",
        "round_half_even(exp2_coarse(x) * set(255.0f))",
        "round_half_even(exp2_coarse(x) * set(255.0f) - set(0.5f))",
    ),
    Mutation(
        "hidden values that are not finite are multiplied",
        "isa/float/attention/attention.h",
        "return sum_of(check) == 0.0f;",
        "return sum_of(check) == 0.0f || true;",
    ),
    Mutation(
        "avx512 transposes a wrong quarter of the keys",
        "isa/float/tile/tile_avx512.h",
        "_mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0xdd)",
        "_mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0x88)",
        "avx512_vnni",
    ),
    Mutation(
        "gelu reads its table one row off",
        "isa/float/activations.h",
        "lookup(kGeluTable[power], i)",
        "lookup(kGeluTable[power], i - set(1.0f))",
    ),
    Mutation(
        "avx2 takes the wrong half of a table",
        "isa/float/vector/vector_avx2.h",
        "_mm256_slli_epi32(i, 28)",
        "_mm256_slli_epi32(i, 29)",
        "avx2",
    ),
    Mutation(
        "a norm's padding counts in the variance",
        "isa/float/norms.h",
        "lanes >= 16 ? value : keep(value, lanes)",
        "value",
    ),
    Mutation(
        "avx512 subtracts the wrong way",
        "isa/float/vector/vector_avx512.h",
        "return {_mm512_sub_ps(a.lanes, b.lanes)}",
        "return {_mm512_sub_ps(b.lanes, a.lanes)}",
        "avx512_vnni",
    ),
    Mutation(
        "the last row of a tile keeps its activation to itself",
        "drivers/linear.cpp",
        "FloatType::f32, e.m, e.n, e.out",
        "FloatType::f32, e.m - 1, e.n, e.out",
    ),
    Mutation("padding of packed weights is not zero", "drivers/pack.cpp", "std::int8_t{0}", "std::int8_t{1}"),
    Mutation(
        "int8_mm allows sums that do not fit",
        "drivers/linear.cpp",
        "require(k <= kMaxExactK",
        "require(k <= 2 * kMaxExactK",
    ),
]


def build(source: Path, build_folder: Path) -> None:
    configure = ["cmake", "-S", source, "-B", build_folder, "-DOCTAVO_BUILD_TESTS_ONLY=ON"]
    for command in (configure, ["cmake", "--build", build_folder, "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def passes(build_folder: Path) -> bool:
    return subprocess.run(["ctest", "--test-dir", build_folder], capture_output=True).returncode == 0


def tested_isas(build_folder: Path) -> set[str]:
    program = build_folder / "csrc" / "tests" / "test_kernels"
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^(\w+) +equals scalar", text, re.MULTILINE))


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    source, build_folder = folder / "source", folder / "build"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    build(source, build_folder)
    if not passes(build_folder):
        print("the tests fail without any mutation")
        return 1
    isas = tested_isas(build_folder)
    survivors = 0
    for mutation in MUTATIONS:
        if mutation.isa not in isas:
            print(f"skipped   {mutation.why}: {mutation.isa} is not tested here")
            continue
        file = source / "csrc" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            print(
                f"stale     {mutation.why}: {mutation.file} has {text.count(mutation.old)} such places, not one"
            )
            survivors += 1
            continue
        file.write_text(text.replace(mutation.old, mutation.new))
        build(source, build_folder)
        survived = passes(build_folder)
        survivors += survived
        print(f"{'SURVIVED' if survived else 'caught':9} {mutation.why}", flush=True)
        file.write_text(text)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
