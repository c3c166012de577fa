#!/bin/sh
# Installs what the tests of images need of the system, where root may and anything is missing. Without it they skip.
# crun makes containers where the platform is no root.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for name in podman runc crun catatonit debootstrap; do
    command -v "$name" >/dev/null || missing="$missing $name"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq >/dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            $missing debian-archive-keyring >/dev/null && exit 0
fi
echo "the tests of images will be skipped; they need:$missing" >&2
