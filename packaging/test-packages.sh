#!/bin/sh
# Debian packages that the tests use. Only root on a Debian-like machine installs anything; anyone
# else just runs the tests that need none of them (the others are skipped by name).
set -eu
want=""
need() { command -v "$1" >/dev/null 2>&1 || want="$want $2"; }
need strace strace
need systemd-nspawn systemd-container
need systemd-analyze systemd
need mkfs.ext4 e2fsprogs
need cc gcc
[ -d /usr/share/datasets/fashion-mnist ] || want="$want dataset-fashion-mnist"
[ -n "$want" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Debian packages for the tests:$want"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || true
    # shellcheck disable=SC2086
    apt-get install -qq -y --no-install-recommends $want >/dev/null ||
        echo "could not install$want; the tests that need them will be skipped" >&2
else
    echo "not installed:$want; the tests that need them will be skipped" >&2
fi
