#!/usr/bin/env bash
# One machine: launch/local.sh --config=lcd:sd15 --workdir=runs/sd15
#
# One process uses all devices of the machine. Variables, each optional:
#   DEVICE=gpu       or tpu, or cpu: the file of this folder that sets the environment
#   PROCESSES=1      processes that join over loopback, such as PROCESSES=2 DEVICE=cpu to try a run of two hosts here;
#                    of GPUs each process has one, by its number
#   PORT             of process 0; a free one by default
#   PRINT_ONLY=1     print the commands instead of running them
#   MODULE           run this module instead of lcm_jax.main
# It exits as the command does: 0 if the run is complete, 75 if work is left and the same command resumes it, 1 after an
# error. SIGTERM and Ctrl-C stop every process. To begin again by itself, as a supervisor would:
#   until launch/local.sh --config=lcd:sd15 --workdir=runs/sd15; do [ $? = 75 ] || break; done
set -euo pipefail

processes=${PROCESSES:-1} device=${DEVICE:-gpu}
start=$(dirname "$0")/$device
case $device in
  cpu | gpu | tpu) ;;
  *) echo "error: DEVICE $device is not supported; use gpu, tpu or cpu" >&2 && exit 1 ;;
esac
if ! [ "$processes" -ge 1 ] 2>/dev/null; then
  echo "error: PROCESSES $processes is not a number of processes; use 1 or more" >&2 && exit 1
fi
if [ "$processes" = 1 ]; then
  exec "$start" "$@"
fi
if [ "$device" = tpu ]; then
  echo "error: PROCESSES $processes is not supported with DEVICE=tpu; use one, which has all chips" >&2 && exit 1
fi

port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
pids=() stopped=0
# Children in the background ignore the terminal's Ctrl-C, so that it is passed on as SIGTERM.
trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP  # some may have ended
for ((number = 0; number < processes && !stopped; number++)); do
  JAX_LOCAL_DEVICE_IDS=$number "$start" "$@" --coordinator="127.0.0.1:$port" --num_processes="$processes" \
    --process_id="$number" &
  pids+=($!)
  [ -z "${PRINT_ONLY:-}" ] || wait "$!"  # one line after the other
done

status=0
for pid in "${pids[@]}"; do
  while stopped=0; code=0; wait "$pid" || code=$?; [ "$stopped" = 1 ]; do :; done  # a signal ends `wait` early
  if [ "$status" = 0 ] || [ "$status" = 75 ]; then  # an error counts more than a stop
    [ "$code" = 0 ] || status=$code
  fi
done
exit "$status"
