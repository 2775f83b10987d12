#!/bin/sh
# Browser tests use the headless shell of Chromium where there is one (half of the CPU seconds), else Chromium; where
# one is missing and we are root on Debian, install both.
set -e
command -v chromium >/dev/null && command -v chromium-headless-shell >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { command -v chromium >/dev/null || echo "opdlab: no chromium; browser tests will be skipped"; exit 0; }
echo "opdlab: installing chromium and fonts for the browser tests"
apt-get update -qq || command -v chromium >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-noto-color-emoji fonts-noto-cjk fonts-dejavu-core >/dev/null
# Not every release has it.
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium-headless-shell >/dev/null || true
