#!/bin/sh
# Writes tools/lock/*.txt anew: the newest versions that pyproject.toml allows, with the hashes of all their files.
#   build.txt  what makes the package
#   agent.txt  what the agent imports, for its image
#   ui.txt     what `ebpfproxy ui` imports in addition
#   otlp.txt   what the agent imports in addition where otlpEndpoint is set
#   test.txt   all of that, and what tests and linters need, for set-up and CI
#   fuzz.txt   what `make fuzz` needs in addition
#   setup.txt  what installs test.txt
# A different folder as $1 leaves the lock as it is.
set -eu
cd "$(dirname "$0")/.."
to=${1:-tools/lock}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
/usr/bin/python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q pip-tools

compile() {
	"$work/venv/bin/pip-compile" --quiet --no-config --strip-extras --generate-hashes --allow-unsafe --no-header \
		--no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options "$@" pyproject.toml
}

mkdir -p "$to"
compile --extra test --extra ui --extra otlp --build-deps-for wheel --build-deps-for editable --output-file "$work/test.txt"
# Versions are those of test.txt.
sed -n 's/^\([a-z0-9.-]*==[^ ]*\).*/\1/p' "$work/test.txt" >"$work/versions"
PIP_CONSTRAINT="$work/versions" compile --output-file "$work/agent.txt"
for extra in ui otlp fuzz setup; do
	PIP_CONSTRAINT="$work/versions" compile --extra $extra --output-file "$work/all-$extra.txt"
	awk 'NR == FNR { known[$1]; next } /^[a-z]/ { keep = !($1 in known) } keep' \
		"$work/agent.txt" "$work/all-$extra.txt" >"$work/$extra.txt"
done
PIP_CONSTRAINT="$work/versions" compile --only-build-deps --build-deps-for wheel --build-deps-for editable \
	--output-file "$work/build.txt"
for name in build agent ui otlp test fuzz setup; do
	grep -q '^[a-z].*==' "$work/$name.txt"
	{
		echo "# Written by tools/lock.sh (make lock)."
		cat "$work/$name.txt"
	} >"$to/$name.txt"
done
