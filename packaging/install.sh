#!/bin/sh
# Installs Edge Runtime as a systemd service, or removes it. Run as root from a checkout.
#
#   packaging/install.sh install     environment in /opt/edge-runtime, units, group; enables and starts
#   packaging/install.sh units       units and group only (the environment comes from elsewhere)
#   packaging/install.sh uninstall   stops and removes all that, keeps models and configuration
#   packaging/install.sh purge       uninstall, and models and configuration too
#
# Every command may be repeated. Variables: PYTHON (python3), EXTRAS (onnxruntime,image), and DESTDIR
# to write into another root, where nothing is started.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
prefix=/opt/edge-runtime
units="edge-runtime.service edge-runtime-infer.socket edge-runtime-control.socket"

# systemctl for the running system, or for the files below DESTDIR.
manager() {
    if [ -n "$root" ]; then
        systemctl --quiet --root="$root" "$@"
    else
        systemctl --quiet "$@"
    fi
}

running() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

install_environment() {
    [ -x "$root$prefix/bin/python" ] || "${PYTHON:-python3}" -m venv "$root$prefix"
    "$root$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
        "$here/..[${EXTRAS:-onnxruntime,image}]"
}

install_units() {
    for unit in $units; do
        install -D -m 0644 "$here/$unit" "$root/etc/systemd/system/$unit"
    done
    install -D -m 0644 "$here/edge-runtime.sysusers.conf" "$root/etc/sysusers.d/edge-runtime.conf"
    install -D -m 0644 "$here/../docs/install.md" "$root$prefix/share/doc/edge-runtime/install.md"
    install -d -m 0755 "$root/etc/edge-runtime"
    systemd-sysusers ${root:+--root="$root"} "$root/etc/sysusers.d/edge-runtime.conf"
    # shellcheck disable=SC2086
    manager enable $units
}

start() {
    running || return 0
    systemctl daemon-reload
    # Started sockets stay as they are: connections wait in them while the daemon restarts.
    systemctl start edge-runtime-infer.socket edge-runtime-control.socket
    systemctl restart edge-runtime.service
}

uninstall() {
    # shellcheck disable=SC2086
    if running; then systemctl stop $units 2>/dev/null || true; fi
    # shellcheck disable=SC2086
    manager disable $units 2>/dev/null || true
    for unit in $units; do rm -f "$root/etc/systemd/system/$unit"; done
    rm -f "$root/etc/sysusers.d/edge-runtime.conf"
    rm -rf "$root$prefix"
    if running; then systemctl daemon-reload; fi
}

purge() {
    uninstall
    rm -rf "$root/var/lib/private/edge-runtime" "$root/var/lib/edge-runtime" \
        "$root/etc/edge-runtime" "$root/etc/systemd/system/edge-runtime.service.d"
}

case "${1:-}" in
install)
    install_environment
    install_units
    start
    ;;
units)
    install_units
    start
    ;;
uninstall) uninstall ;;
purge) purge ;;
*)
    sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
    exit 2
    ;;
esac
