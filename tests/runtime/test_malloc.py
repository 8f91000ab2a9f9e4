# SPDX-License-Identifier: Apache-2.0
"""keep_memory: freed buffers come back without page faults. In processes of their own: it cannot be taken back."""

import platform
import subprocess
import sys

import pytest

import octavo

FAULTS_OF_TEN_BUFFERS = """
import resource, sys
import torch, octavo

if sys.argv[1] == "keep":
    assert octavo.keep_memory() is True


def allocate(rounds):
    for _ in range(rounds):
        buffers = [torch.ones(6 << 20) for _ in range(5)]  # 24 MB each: below the threshold
        del buffers


allocate(15)  # until the heap has the size that it keeps: how many rounds that takes depends on what lies in it
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate(2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_TEN_BUFFERS, argument]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_buffers_are_reused_without_page_faults():
    # A page is at most 64 KB, so ten new buffers of 24 MB would be at least 3,840 faults; huge pages could make less of
    # them, and then there would be nothing to save: the comparison holds there as well.
    kept, returned = faults("keep"), faults("default")
    assert kept < 3840
    assert kept <= returned


@pytest.mark.parametrize("megabytes", [0, -1])
def test_a_size_that_is_not_positive_is_refused(megabytes):
    with pytest.raises(ValueError, match="keep_memory: megabytes is"):
        octavo.keep_memory(megabytes)
