// SPDX-License-Identifier: Apache-2.0
// A software model of the AMX tile instructions that isa/integer/amx_int8.cpp uses, written from their description in Intel's
// "Instruction Set Extensions Programming Reference", chapter 3. amx_model.cpp includes the model before the kernel, where it
// takes the place of the intrinsics, so that every machine can test the kernel. The model refuses what the CPU would refuse: a
// tile that is not configured, shapes that do not fit, one tile in two roles.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace octavo_amx_model {

struct TileRegister {
  std::uint8_t bytes[16][64];
};

struct State {
  bool configured = false;
  int rows[8] = {}, row_bytes[8] = {};
  TileRegister tiles[8] = {};
};

inline State& state() {
  static thread_local State instance;
  return instance;
}

inline void refuse(bool wrong, const char* what) {
  if (!wrong) return;
  std::fprintf(stderr, "amx model: %s\n", what);
  std::abort();
}

inline TileRegister& configured_tile(int tile) {
  refuse(!state().configured || state().rows[tile] == 0, "a tile that is not configured");
  return state().tiles[tile];
}

inline void loadconfig(const void* memory) {
  const auto* bytes = static_cast<const std::uint8_t*>(memory);
  refuse(bytes[0] != 1, "the palette must be 1");
  State& s = state();
  s = State{};
  s.configured = true;
  for (int tile = 0; tile < 8; ++tile) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, 2);
    s.row_bytes[tile] = row_bytes;
    s.rows[tile] = bytes[48 + tile];
    refuse(row_bytes > 64 || s.rows[tile] > 16, "a tile has at most 16 rows of 64 bytes");
    std::memset(&s.tiles[tile], 0xcd,
                sizeof(TileRegister));  // not 0, so that a tile that is read before _tile_zero shows
  }
}

inline void release() { state() = State{}; }

inline void zero(int tile) { std::memset(&configured_tile(tile), 0, sizeof(TileRegister)); }

inline void loadd(int tile, const void* base, std::ptrdiff_t stride) {
  TileRegister& t = configured_tile(tile);
  for (int row = 0; row < state().rows[tile]; ++row) {
    std::memcpy(t.bytes[row], static_cast<const char*>(base) + row * stride,
                static_cast<std::size_t>(state().row_bytes[tile]));
  }
}

inline void stored(int tile, void* base, std::ptrdiff_t stride) {
  const TileRegister& t = configured_tile(tile);
  for (int row = 0; row < state().rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, t.bytes[row],
                static_cast<std::size_t>(state().row_bytes[tile]));
  }
}

inline void dpbusd(int c, int a, int b) {
  TileRegister &tc = configured_tile(c), &ta = configured_tile(a), &tb = configured_tile(b);
  const State& s = state();
  refuse(c == a || a == b || c == b, "the three tiles of a product must differ");
  refuse(s.rows[c] != s.rows[a] || s.row_bytes[c] != s.row_bytes[b] || s.row_bytes[a] != 4 * s.rows[b],
         "shapes of a product do not fit");
  for (int row = 0; row < s.rows[c]; ++row) {
    for (int column = 0; column < s.row_bytes[c] / 4; ++column) {
      std::uint32_t sum;
      std::memcpy(&sum, &tc.bytes[row][4 * column], 4);
      for (int k = 0; k < s.row_bytes[a]; ++k) {
        const int product = ta.bytes[row][k] * static_cast<std::int8_t>(tb.bytes[k / 4][4 * column + k % 4]);
        sum += static_cast<std::uint32_t>(product);
      }
      std::memcpy(&tc.bytes[row][4 * column], &sum, 4);
    }
  }
}

}  // namespace octavo_amx_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#define _tile_loadconfig octavo_amx_model::loadconfig
#define _tile_release octavo_amx_model::release
#define _tile_zero octavo_amx_model::zero
#define _tile_loadd octavo_amx_model::loadd
#define _tile_stored octavo_amx_model::stored
#define _tile_dpbusd octavo_amx_model::dpbusd
