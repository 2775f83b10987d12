#!/bin/sh
# Browser tests use the Chromium on the machine; where it is missing and we are root on Debian, install it.
set -e
command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "opdlab: no chromium; browser tests will be skipped"; exit 0; }
echo "opdlab: installing chromium and fonts for the browser tests"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-noto-color-emoji fonts-noto-cjk fonts-dejavu-core >/dev/null
