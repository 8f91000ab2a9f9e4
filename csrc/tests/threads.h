// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace octavo::test {

void set_thread_count(int count);

}  // namespace octavo::test
