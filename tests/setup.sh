#!/bin/sh
# Installs what demo, tests and benchmarks need: Debian's packages, and a virtual environment in $1.
set -eu

packages="bpftool clang clang-format curl iperf3 iproute2 iptables libbpf1 libcap2-bin musl-tools nftables nginx-light procps
prometheus python3-bpfcc python3-venv runc socat tcpdump util-linux wrk"

missing=
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
	apt-get update -q
	# shellcheck disable=SC2086 # a list of words
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
fi

# Another python3 may be first on PATH; only the distribution's has bcc.
/usr/bin/python3 -m venv --system-site-packages "$1"
"$1/bin/python" -m pip install -q -e '.[test]'
