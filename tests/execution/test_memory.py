"""Free memory is what the machine and every control group of this process leave, by version 1, 2 or both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import eapcore.execution.memory as memory

CPU, MIB = torch.device("cpu"), 1 << 20
NONE = 9223372036854771712  # how version 1 writes that there is no limit


def group(folder, limit, used, *, version=2, high="max", unread=0):
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        files = {"memory.max": limit, "memory.high": high, "memory.current": used}
        stat = f"anon 5\nfile {unread + 7}\ninactive_file {unread}\n"
    else:
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.memsw.limit_in_bytes": 5 * MIB}
        stat = f"inactive_file 0\nhierarchical_memory_limit {limit}\ntotal_inactive_file {unread}\n"
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)
    (folder / "memory.swap.max").write_text(f"{1 << 40}\n")


def system(root, own, mounts):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    lines = [
        f"{30 + i} 25 0:{i} {at} {where} rw,relatime shared:{i} - {kind}" for i, (at, where, kind) in enumerate(mounts)
    ]
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "\n".join(lines) + "\n")
    return sorted(memory._group_bytes(root))


V2 = ("/", "/sys/fs/cgroup", "cgroup2 cgroup2 rw,nsdelegate")
V1 = ("/", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory")
V1_OTHER = ("/", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu,cpuacct")


def test_a_container_whose_group_is_all_that_it_sees(tmp_path):
    group(tmp_path / "sys/fs/cgroup", 340 * MIB, 100 * MIB, unread=20 * MIB)
    assert system(tmp_path, "0::/\n", [V2]) == [260 * MIB]


def test_the_lower_of_max_and_high_counts_and_swap_does_not(tmp_path):
    group(tmp_path / "sys/fs/cgroup", 340 * MIB, 100 * MIB, high=200 * MIB)
    assert system(tmp_path, "0::/\n", [V2]) == [100 * MIB]


def test_every_group_above_a_nested_one_counts(tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    group(top / "a", 900 * MIB, 800 * MIB)
    group(top / "a/b", "max", 10 * MIB)
    group(top / "a/b/c", 300 * MIB, 10 * MIB)
    group(top / "other", MIB, MIB)
    assert system(tmp_path, "0::/a/b/c\n", [V2]) == [100 * MIB, 290 * MIB]


def test_version_1_with_groups_of_other_controllers_and_a_version_2_without_memory(tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    group(top, NONE, 5000 * MIB, version=1)
    group(top / "jobs", 512 * MIB, 500 * MIB, version=1, unread=100 * MIB)
    group(top / "jobs/one", NONE, 5 * MIB, version=1)
    (tmp_path / "sys/fs/cgroup/unified/jobs").mkdir(parents=True)
    own = "9:cpu,cpuacct:/else\n4:memory:/jobs/one\n1:name=systemd:/\n0::/jobs\n"
    unified = ("/", "/sys/fs/cgroup/unified", "cgroup2 cgroup2 rw")
    assert system(tmp_path, own, [V1, V1_OTHER, unified])[0] == 112 * MIB


def test_a_container_that_names_its_group_as_the_host_does(tmp_path):
    group(tmp_path / "sys/fs/cgroup/memory", 340 * MIB, 40 * MIB, version=1)
    mounted = ("/docker/0123", *V1[1:])
    assert system(tmp_path, "4:memory:/docker/0123\n", [mounted]) == [300 * MIB]
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/somewhere/else\n")  # of which it sees nothing
    assert memory._group_bytes(tmp_path) == [300 * MIB]


def test_a_system_without_groups_or_with_files_that_nobody_knows_has_no_limit(tmp_path):
    assert memory._group_bytes(tmp_path) == []
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("as much as you like\n")
    assert system(tmp_path, "0::/\n", [V2]) == []


def test_free_memory_is_the_least_that_is_left_and_never_negative(monkeypatch):
    of_machine = memory.free_bytes(CPU)
    for left, expected in (([3 * MIB, 2 * MIB], 2 * MIB), ([-MIB, MIB], 0)):
        monkeypatch.setattr(memory, "_group_bytes", lambda left=left: left[:])
        assert memory.free_bytes(CPU) == expected
    monkeypatch.setattr(memory, "_group_bytes", lambda: [1 << 60])
    assert memory.free_bytes(CPU) == pytest.approx(of_machine, rel=0.5)


def test_a_process_that_is_really_limited_knows_it():
    """Where this process may make a group of its own below the one it is in."""
    own = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {
        "memory.limit_in_bytes": [Path("/sys/fs/cgroup/memory" + path) for names, path in own if "memory" in names],
        "memory.max": [Path("/sys/fs/cgroup" + path) for names, path in own if not names],
    }
    for limit, folder in ((limit, folder) for limit, folders in places.items() for folder in folders):
        mine = folder / f"eapcore-test-{os.getpid()}"
        try:
            mine.mkdir()
        except OSError:
            continue
        try:
            (mine / limit).write_text(str(340 * MIB))
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    (mine / "cgroup.procs").write_text(str(os.getpid()))
                    os.write(write, str(memory.free_bytes(CPU)).encode())
                finally:
                    os._exit(0)
            os.close(write)
            os.waitpid(child, 0)
            found = os.read(read, 100).decode()
        except OSError:
            continue
        finally:
            mine.rmdir()
        if found:
            assert 200 * MIB < int(found) <= 340 * MIB
            return
    pytest.skip("no control group can be made here")
