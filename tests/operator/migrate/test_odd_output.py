"""What other tools, processes and the kernel may say on a node where somebody chose odd names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebpfproxy.datapath.kernel import roots
from ebpfproxy.operator.migrate.node import iptables, ipvs, nftables, obstacles, running_kube_proxy, tools
from ebpfproxy.operator.migrate.node.tools import ToolError

#: A process may give itself any name of 15 bytes.
ODD_NAME = b"\xff\x1b[31m\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """/proc with a process of an odd name, and one that is known by its name."""
    for number, name in ((7, ODD_NAME), (8, b"k3s-server\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "comm").write_bytes(name)
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/net").symlink_to("/proc/self/ns/net")
    return tmp_path


def test_process_whose_name_is_no_text_stops_no_migration(proc: Path) -> None:
    assert running_kube_proxy.find(proc) == []
    assert running_kube_proxy.embedded(proc) == "k3s"
    assert "k3s-server" in obstacles._processes(proc)


def test_kube_proxy_with_a_configuration_that_is_no_text_is_a_problem_of_it(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"\xff\xfe\x00")
    mode, problems = running_kube_proxy.read_config(tmp_path / "config", "config.conf")
    assert mode == ""
    assert [each.partition(":")[0] for each in problems] == ["config.conf"]


@pytest.mark.parametrize("saved", [":KUBE-SVC-X - [0:0]\n", "-A KUBE-SVC-X -j DROP\n", "*nat\n:KUBE-SVC-X\n"])
def test_rules_that_cannot_be_read_are_an_error_with_the_line(saved: str) -> None:
    with pytest.raises(ToolError, match=r"iptables-save printed a line '[:-]"):
        iptables.plan(saved)


def test_end_of_a_line_in_a_comment_ends_no_rule() -> None:
    """Only a line feed does: iptables prints other characters as they are."""
    comment = '-A INPUT -m comment --comment "a\u2028-A INPUT -j KUBE-SERVICES" -j ACCEPT'
    saved = f"*filter\n:INPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n{comment}\nCOMMIT\n"
    (plan,) = iptables.plan(saved)
    assert plan.jumps == ()


def test_bytes_of_a_rule_are_restored_as_they_were_saved(tmp_path: Path) -> None:
    """A comment may be in any encoding."""
    rule = b'-A INPUT -m comment --comment "caf\xe9" -j KUBE-SERVICES\n'
    (tmp_path / "saved").write_bytes(b"*filter\n:INPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n" + rule)
    (plan,) = iptables.plan(tools.run("cat", str(tmp_path / "saved")))
    tools.run("cp", "/dev/stdin", str(tmp_path / "restored"), stdin=plan.script())
    assert rule.replace(b"-A ", b"-D ") in (tmp_path / "restored").read_bytes()


@pytest.mark.parametrize(
    "printed", ["", "[]", '{"nftables": [1]}', '{"nftables": [{"table": {}}]}', "[" * 100_000]
)
def test_tables_that_cannot_be_read_are_an_error(printed: str) -> None:
    with pytest.raises(ToolError, match="nft printed no list of tables"):
        nftables.plan(printed)


def test_virtual_server_without_an_address_is_an_error() -> None:
    with pytest.raises(ToolError, match=r"'f:0096' is no address"):
        ipvs.parse("TCP  [f:0096]:01BB rr\n")


@pytest.mark.parametrize("cgroup", ["", "0", "0:\n1", "0::/\n", "\n\n"])
def test_process_of_an_unknown_cgroup_is_a_process(cgroup: str) -> None:
    assert running_kube_proxy.started_by(cgroup) == "process"


def test_mounts_are_found_by_the_bytes_of_their_paths() -> None:
    """Spaces and ends of lines are octal in /proc/self/mounts; all else is as it is in the path."""
    table = b"x /mnt/caf\xc3\xa9\\040\\012 bpf rw 0 0\ny /mnt/\xff\xe2\x80\xa8z cgroup2 rw 0 0\n\n"
    assert [(os.fsencode(each.point), each.kind) for each in roots._mounts(table)] == [
        (b"/mnt/caf\xc3\xa9 \n", "bpf"),
        (b"/mnt/\xff\xe2\x80\xa8z", "cgroup2"),
    ]


def test_what_a_failing_tool_says_is_one_line_that_can_be_printed() -> None:
    with pytest.raises(ToolError) as raised:
        tools.run("sh", "-c", r"printf 'a\033[31mb\377' >&2; exit 1")
    assert str(raised.value).isprintable()
