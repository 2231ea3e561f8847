#!/bin/sh
# Runs the BPF, socket, IPVS and NFS tests on Debian's own kernel (6.1), in an emulator: no KVM needed, half an hour.
# Needs root, the virtual environment that make setup made, and about 3 GB below /tmp.
# Arguments are pytest's; without any: what depends on the kernel.
set -eu

[ $# -gt 0 ] || set -- tests/datapath tests/packets tests/e2e/test_sockets.py tests/e2e/test_outside.py \
	tests/operator/migrate/test_ipvs_kernel.py tests/field/test_nfs_kernel.py \
	-k "not sctp_through and (datapath or packets or sockets or safe or clsact or bypass or ipvs_kernel or nfs_kernel)"
tests=$(printf "'%s' " "$@")

top=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for package in mmdebstrap qemu-system-x86 e2fsprogs; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' && continue
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$package"
done

root=$work/root
mmdebstrap --quiet --variant=minbase \
	--include=python3-bpfcc,clang,iproute2,socat,procps,kmod,initramfs-tools,linux-image-cloud-amd64 \
	--include=bpftool,ipvsadm,ipset,iptables,nftables,conntrack \
	bookworm "$root"
# The virtual environment knows the checkout by its path.
mkdir -p "$root$top"
mkdir -p "$top/.bytecode"
(cd "$top" && git ls-files -z | tar -c --null -T - .venv .bytecode) | tar -x -C "$root$top"
cat >"$root/run-tests" <<END
#!/bin/sh
export EBPFPROXY_LAB_SECONDS=300 EBPFPROXY_OWN_MACHINE=1 PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mountpoint -q /run || mount -t tmpfs run /run
case "$top" in /tmp/*) ;; *) mount -t tmpfs tmp /tmp ;; esac
mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up
modprobe -a veth bridge sch_ingress cls_bpf ip_vs nfsv4 nfsd
uname -r
cd "$top"
.venv/bin/python -m pytest -q --color=no -p no:cacheprovider --timeout 900 \
	$tests && echo KERNEL-TESTS-PASSED
echo o >/proc/sysrq-trigger
sleep 60
END
chmod +x "$root/run-tests"
mv "$root"/boot/vmlinuz-* "$work/vmlinuz"
mv "$root"/boot/initrd.img-* "$work/initrd"
truncate -s 3G "$work/disk"
mkfs.ext4 -q -d "$root" "$work/disk"
rm -rf "$root"

timeout 3600 qemu-system-x86_64 -accel tcg,thread=multi -smp 2 -m 3G -nographic -no-reboot -nic none \
	-kernel "$work/vmlinuz" -initrd "$work/initrd" -drive "file=$work/disk,format=raw,if=virtio" \
	-append "console=ttyS0 quiet root=/dev/vda rw init=/run-tests" </dev/null | tee "$work/log"
grep -q KERNEL-TESTS-PASSED "$work/log"
