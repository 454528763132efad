#!/usr/bin/env bash
# commit-msg hook: the first line of the message in FILE ($1) is at most 72 characters long.
set -euo pipefail
export LC_ALL=C.UTF-8 # characters, not bytes
readonly LIMIT=72
IFS= read -r subject <"$1" || true
if ((${#subject} > LIMIT)); then
  echo "The subject has ${#subject} characters, the limit is $LIMIT: $subject" >&2
  exit 1
fi
