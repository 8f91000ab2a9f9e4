// SPDX-License-Identifier: Apache-2.0
// Checks of user input. A failed check throws std::invalid_argument, which Python sees as a ValueError with the same text.
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
