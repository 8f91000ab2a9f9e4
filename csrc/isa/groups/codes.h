// SPDX-License-Identifier: Apache-2.0
// How lines of unsigned bytes come out of packed codes, over the Line of an instruction set: one struct for each form.
//
// Each form has kUnits, the units of 16 k in one step, kStepBytes, kLargestCode, and each_line: it calls f(line, lines) for the lines of
// one step, `lines` being one Line for each strip. docs/packed_format.md draws the forms.
#pragma once

#include <utility>

#include "contract/group_kernel.h"

namespace octavo {
namespace {

// Lambdas that are called from several places and hold registers must be inlined.
#define OCTAVO_INLINE __attribute__((always_inline))

// Calls f(std::integral_constant<int, i>) for i = 0 .. kCount. A loop that the compiler unrolls would not do here: g++ 12
// unrolls after it has decided which arrays live in registers.
template <class F, int... kIndices>
OCTAVO_INLINE inline void each_of(const F& f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}
template <int kCount, class F>
OCTAVO_INLINE inline void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, kCount>{});
}

// Calls f(strip, Line&) for each of kStrips lines and then use(line, lines).
template <int kStrips, class Make, class Use>
OCTAVO_INLINE inline void with_lines(int line, const Make& make, const Use& use) {
  Line lines[kStrips];
  each<kStrips>([&](auto s) OCTAVO_INLINE { lines[s] = make(s); });
  use(line, lines);
}

// Lines of S16 as they are, unsigned.
struct Lines {
  static constexpr int kUnits = 1, kStepBytes = 4 * kLineBytes, kLargestCode = 127;

  explicit Lines(const GroupCodes&) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    each<4>([&](auto l) OCTAVO_INLINE {
      with_lines<kStrips>(l, [&](int s) OCTAVO_INLINE { return load_line(at[s] + l * kLineBytes); }, f);
    });
  }
};

// Lines of S16 with signed codes: u = code + 128.
struct SignedLines {
  static constexpr int kUnits = 1, kStepBytes = 4 * kLineBytes, kLargestCode = 255;

  explicit SignedLines(const GroupCodes&) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    each<4>([&](auto l) OCTAVO_INLINE {
      with_lines<kStrips>(
          l, [&](int s) OCTAVO_INLINE { return with_flipped_sign(load_line(at[s] + l * kLineBytes)); }, f);
    });
  }
};

// 4 bits: the low halves of line l are line 2 l, the high halves line 2 l + 1.
struct Halves {
  static constexpr int kUnits = 2, kStepBytes = 4 * kLineBytes, kLargestCode = 15;

  explicit Halves(const GroupCodes&) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    each<4>([&](auto l) OCTAVO_INLINE {
      Line packed[kStrips];
      each<kStrips>([&](auto s) OCTAVO_INLINE { packed[s] = load_line(at[s] + l * kLineBytes); });
      with_lines<kStrips>(2 * l, [&](int s) OCTAVO_INLINE { return masked(packed[s], 15); }, f);
      with_lines<kStrips>(2 * l + 1, [&](int s) OCTAVO_INLINE { return masked(shifted_right<4>(packed[s]), 15); }, f);
    });
  }
};

// The same with a table of 16 values.
struct Table {
  static constexpr int kUnits = 2, kStepBytes = 4 * kLineBytes, kLargestCode = 127;

  explicit Table(const GroupCodes& codes) : table(load_table(codes.table)) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    Halves(GroupCodes{}).each_line(at, [&](int line, const Line(&codes)[kStrips]) OCTAVO_INLINE {
      with_lines<kStrips>(line, [&](int s) OCTAVO_INLINE { return looked_up(table, codes[s]); }, f);
    });
  }

  Line table;
};

// Values above 127 in two parts of 7 bits, one line after the other: for products of pairs of bytes that must fit int16.
struct WideTable {
  static constexpr int kUnits = 2, kStepBytes = 4 * kLineBytes, kLargestCode = 127;

  explicit WideTable(const GroupCodes& codes) {
    std::uint8_t parts[2][kTableSize];
    for (int i = 0; i < kTableSize; ++i) {
      parts[0][i] = codes.table[i] < 127 ? codes.table[i] : 127;
      parts[1][i] = static_cast<std::uint8_t>(codes.table[i] - parts[0][i]);
    }
    low = load_table(parts[0]);
    high = load_table(parts[1]);
  }

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    Halves(GroupCodes{}).each_line(at, [&](int line, const Line(&codes)[kStrips]) OCTAVO_INLINE {
      with_lines<kStrips>(line, [&](int s) OCTAVO_INLINE { return looked_up(low, codes[s]); }, f);
      with_lines<kStrips>(line, [&](int s) OCTAVO_INLINE { return looked_up(high, codes[s]); }, f);
    });
  }

  Line low, high;
};

// 2 bits: line l holds the lines 4 l .. 4 l + 3, the first one in the lowest bits.
struct Quarters {
  static constexpr int kUnits = 2, kStepBytes = 2 * kLineBytes, kLargestCode = 3;

  explicit Quarters(const GroupCodes&) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    each<2>([&](auto l) OCTAVO_INLINE {
      Line packed[kStrips];
      each<kStrips>([&](auto s) OCTAVO_INLINE { packed[s] = load_line(at[s] + l * kLineBytes); });
      with_lines<kStrips>(4 * l, [&](int s) OCTAVO_INLINE { return masked(packed[s], 3); }, f);
      with_lines<kStrips>(4 * l + 1, [&](int s) OCTAVO_INLINE { return masked(shifted_right<2>(packed[s]), 3); }, f);
      with_lines<kStrips>(4 * l + 2, [&](int s) OCTAVO_INLINE { return masked(shifted_right<4>(packed[s]), 3); }, f);
      with_lines<kStrips>(4 * l + 3, [&](int s) OCTAVO_INLINE { return masked(shifted_right<6>(packed[s]), 3); }, f);
    });
  }
};

// 3 bits: 3 bytes, one of each line, hold the codes of 8 lines. Line 0 holds 0, 1 and the low bits of 2, line 1 holds 3, 4 and
// the low bits of 5, line 2 holds 6, 7 and the high bits of 2 and 5.
struct Thirds {
  static constexpr int kUnits = 2, kStepBytes = 3 * kLineBytes, kLargestCode = 7;

  explicit Thirds(const GroupCodes&) {}

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    Line high[kStrips];  // bits 6 and 7 belong to the lines 2 and 5
    each<kStrips>([&](auto s) OCTAVO_INLINE { high[s] = load_line(at[s] + 2 * kLineBytes); });
    each<2>([&](auto l) OCTAVO_INLINE {
      Line packed[kStrips];
      each<kStrips>([&](auto s) OCTAVO_INLINE { packed[s] = load_line(at[s] + l * kLineBytes); });
      with_lines<kStrips>(3 * l, [&](int s) OCTAVO_INLINE { return masked(packed[s], 7); }, f);
      with_lines<kStrips>(3 * l + 1, [&](int s) OCTAVO_INLINE { return masked(shifted_right<3>(packed[s]), 7); }, f);
      with_lines<kStrips>(
          3 * l + 2,
          [&](int s) OCTAVO_INLINE {
            const Line third = masked(l == 0 ? shifted_right<4>(high[s]) : shifted_right<5>(high[s]), 4);
            return either(masked(shifted_right<6>(packed[s]), 3), third);
          },
          f);
    });
    with_lines<kStrips>(6, [&](int s) OCTAVO_INLINE { return masked(high[s], 7); }, f);
    with_lines<kStrips>(7, [&](int s) OCTAVO_INLINE { return masked(shifted_right<3>(high[s]), 7); }, f);
  }
};

// `line` of 8 lines out of lines that hold kWidth bits of each code.
template <int kWidth, int kLine>
OCTAVO_INLINE inline Line part_of(const std::uint8_t* lines) {
  constexpr int kInByte = 8 / kWidth;
  const Line packed = load_line(lines + kLine / kInByte * kLineBytes);
  return masked(shifted_right<kLine % kInByte * kWidth>(packed), (1 << kWidth) - 1);
}

// 1, 5, 6 and 7 bits: planes of 4, 2 and 1 bits, the lowest one first. Only for one strip, to be unpacked.
template <int kBits>
struct Planes {
  static constexpr int kUnits = 2, kStepBytes = kBits * kLineBytes;

  explicit Planes(const GroupCodes&) {}

  template <int kLine>
  OCTAVO_INLINE static Line line_of(const std::uint8_t* at) {
    Line line = masked(load_line(at), 0);
    if constexpr (kBits & 4) line = part_of<4, kLine>(at);
    if constexpr (kBits & 2)
      line = either(line, shifted_left<kBits & 4>(part_of<2, kLine>(at + (kBits & 4) * kLineBytes)));
    if constexpr (kBits & 1)
      line = either(line, shifted_left<kBits & 6>(part_of<1, kLine>(at + (kBits & 6) * kLineBytes)));
    return line;
  }

  template <int kStrips, class F>
  OCTAVO_INLINE void each_line(const std::uint8_t* const (&at)[kStrips], const F& f) const {
    with_lines<kStrips>(0, [&](int s) OCTAVO_INLINE { return line_of<0>(at[s]); }, f);
    with_lines<kStrips>(1, [&](int s) OCTAVO_INLINE { return line_of<1>(at[s]); }, f);
    with_lines<kStrips>(2, [&](int s) OCTAVO_INLINE { return line_of<2>(at[s]); }, f);
    with_lines<kStrips>(3, [&](int s) OCTAVO_INLINE { return line_of<3>(at[s]); }, f);
    with_lines<kStrips>(4, [&](int s) OCTAVO_INLINE { return line_of<4>(at[s]); }, f);
    with_lines<kStrips>(5, [&](int s) OCTAVO_INLINE { return line_of<5>(at[s]); }, f);
    with_lines<kStrips>(6, [&](int s) OCTAVO_INLINE { return line_of<6>(at[s]); }, f);
    with_lines<kStrips>(7, [&](int s) OCTAVO_INLINE { return line_of<7>(at[s]); }, f);
  }
};

template <class Form>
void unpack_form(const UnpackStrip& u) {
  const Form form(u.codes);
  std::uint8_t* out = u.lines;
  const std::uint8_t* at[1] = {u.codes.strips};
  for (std::int64_t unit = 0; unit < u.units; unit += Form::kUnits) {
    form.each_line(at, [&](int line, const Line(&lines)[1])
                           OCTAVO_INLINE { store_line(out + line * kLineBytes, lowered(lines[0], u.lowered_by)); });
    at[0] += Form::kStepBytes;
    out += Form::kUnits * 4 * kLineBytes;
  }
}

[[maybe_unused]] void unpack_strip(const UnpackStrip& u) {
  if (u.codes.table) return unpack_form<Table>(u);
  switch (u.codes.bits) {
    case 1: return unpack_form<Planes<1>>(u);
    case 2: return unpack_form<Quarters>(u);
    case 3: return unpack_form<Thirds>(u);
    case 4: return unpack_form<Halves>(u);
    case 5: return unpack_form<Planes<5>>(u);
    case 6: return unpack_form<Planes<6>>(u);
    case 7: return unpack_form<Planes<7>>(u);
    case 8: return unpack_form<SignedLines>(u);
    default: return unpack_form<Lines>(u);
  }
}

}  // namespace
}  // namespace octavo
