// SPDX-License-Identifier: Apache-2.0
// Checks of user input. std::invalid_argument arrives in Python as ValueError with just this text.
#pragma once

#include <sstream>
#include <stdexcept>

namespace octavo {

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace octavo
