#!/bin/sh
# Installs what demo, tests and benchmarks need: Debian's packages, and a virtual environment in $1 with the locked
# versions, or those of the folder of locks in $2. Beside the system's packages the environment's own come first.
set -eu

packages="bpftool chromium clang clang-format curl iperf3 iproute2 iptables libbpf1 libcap2-bin musl-tools nftables nginx-light procps
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
"$1/bin/python" -m pip install -q --no-deps --require-hashes -r "${2:-tools/lock}/test.txt"
# With the locked setuptools; what is editable has no hash.
"$1/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
