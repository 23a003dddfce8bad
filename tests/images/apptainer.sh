#!/usr/bin/env bash
# Runs a command in a Debian sid root that has the real apptainer (older Debian has none); the current folder is the
# same inside. Makes the root first if need be (a minute, 500 MB). Needs root, debootstrap, uidmap.
#
#   apptainer.sh ROOT apptainer build --sandbox image.d app.def
#
# apptainer run by root wants every capability and refuses a plain chroot. Hence a user namespace, which has them all,
# with ids 0-65535 mapped to themselves, and pivot_root. All mounts stay in a mount namespace of their own.
set -euo pipefail
root=$(realpath -m "$1")
shift

if [ ! -x "$root/usr/bin/apptainer" ]; then
  [ -x "$root/usr/bin/apt-get" ] || debootstrap --variant=minbase --include=ca-certificates sid "$root" >&2
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod +x "$root/usr/sbin/policy-rc.d"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y --no-install-recommends apptainer >&2
fi

sync=$(mktemp -d)
trap 'rm -rf "$sync"' EXIT
mkfifo "$sync/up" "$sync/go"
exec 3<>"$sync/up" 4<>"$sync/go" # opened both ways, so that neither side waits for the other here
export AP_ROOT=$root AP_PWD=$PWD HOME=/root
# shellcheck disable=SC2016  # expanded inside
unshare --user --mount --propagation private bash -euc '
echo >&3; read -r _ <&4; exec 3>&- 4>&-
mount --bind "$AP_ROOT" "$AP_ROOT"; cd "$AP_ROOT"; mkdir -p .old
for d in proc sys dev; do mount --rbind "/$d" "$d"; done
mount -t tmpfs tmpfs tmp
mkdir -p ".$AP_PWD"; mount --rbind "$AP_PWD" ".$AP_PWD"
pivot_root . .old; umount -l /.old; cd "$AP_PWD"
exec setpriv --reuid 0 --regid 0 --clear-groups "$@"' apptainer "$@" &
pid=$!
if ! read -r -t 20 _ <&3; then
  echo "apptainer.sh: no user namespace could be made" >&2
  kill "$pid" 2>/dev/null || true
  exit 1
fi
echo '0 0 65536' >"/proc/$pid/uid_map"
echo '0 0 65536' >"/proc/$pid/gid_map"
echo >&4
wait "$pid"
