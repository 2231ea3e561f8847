#!/bin/sh
# Installs what demo, tests and benchmarks need: Debian's packages, and a virtual environment in $1 with the locked
# versions, or those of the folder of locks in $2. Beside the system's packages the environment's own come first.
set -eu

packages="bpftool busybox-static chromium clang clang-format curl iperf3 iproute2 iptables libbpf1 libcap2-bin musl-tools nftables nginx-light procps
prometheus python3-bpfcc python3-pip python3-venv qemu-system-x86 runc socat tcpdump util-linux wrk"

missing=
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
	apt-get update -q
	# shellcheck disable=SC2086 # a list of words
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
fi

python=$1/bin/python
locks=${2:-tools/lock}

# uv reads neither pip's files nor its variables, which may name the registry.
pass_on() {
	value=
	for section in global install :env:; do
		found=$(printf '%s\n' "$settings" | sed -n "s/^$section\.$1='\(.*\)'\$/\1/p")
		value=${found:-$value}
	done
	if [ -n "$value" ] && ! printenv "$2" >/dev/null; then
		export "$2=$(printf '%s\n' "$value" | sed "s/\\\\n/ /g; s/^ *//; s/ *\$//; s/  */$3/g")"
	fi
}

# uv takes a tenth of pip's processor time. Python compiles what is imported, not all that is installed.
install_with_uv() {
	"$python" -m pip install -q --no-deps --no-compile --only-binary :all: --require-hashes -r "$locks/setup.txt" || return
	settings=$("$python" -m pip config list) || return
	! printf '%s\n' "$settings" | grep -q '\.no-index=' || return
	pass_on index-url UV_DEFAULT_INDEX ' '
	pass_on extra-index-url UV_INDEX ' '
	pass_on find-links UV_FIND_LINKS ,
	pass_on cert SSL_CERT_FILE ' '
	# Of all registries, as pip: the hashes say which file it is.
	"$1/bin/uv" pip install -q --python "$python" --index-strategy unsafe-best-match --no-deps --require-hashes \
		-r "$locks/test.txt" || return
	# With the locked setuptools; what is editable has no hash.
	"$1/bin/uv" pip install -q --python "$python" --no-deps --no-build-isolation -e .
}

install_with_pip() {
	"$python" -m pip install -q --no-deps --no-compile --require-hashes -r "$locks/test.txt"
	"$python" -m pip install -q --no-deps --no-build-isolation -e .
}

# Another python3 may be first on PATH; only the distribution's has bcc, and its pip need not be unpacked first.
/usr/bin/python3 -m venv --system-site-packages --without-pip "$1"
if ! install_with_uv "$1"; then
	echo "uv cannot install the packages here, pip does" >&2
	install_with_pip
fi
