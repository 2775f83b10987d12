#!/bin/sh
# Style, types and unit tests of the pages' scripts. The tools are installed once, in the versions of
# package-lock.json; without npm or without a network the check is left out, except in CI.
set -e
cd "$(dirname "$0")/../.."
leave_out() {
  echo "opdlab: $1; the scripts of the pages are not checked"
  [ -z "$CI" ] || exit 1
  exit 0
}
command -v npm >/dev/null || leave_out "no npm"
mark=node_modules/.done
if [ ! -e "$mark" ] || [ package-lock.json -nt "$mark" ]; then
  echo "opdlab: installing ESLint and TypeScript"
  npm ci --no-audit --no-fund --silent --fetch-retries=5 || leave_out "npm could not install (offline?)"
  touch "$mark"
fi
npm run --silent check
