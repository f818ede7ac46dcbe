#!/usr/bin/env bash
# A Cloud TPU slice, all its workers, from any machine with gcloud:
#   TPU_NAME=lcm ZONE=us-west4-a IMAGE=REGION-docker.pkg.dev/PROJECT/lcm/lcm_jax:tpu \
#     launch/tpu_vm.sh --config=lcd:sd15 --workdir=/mnt/runs/sd15
#
# Variables:
#   TPU_NAME, ZONE            the slice; it is created if there is none
#   IMAGE                     of launch/Dockerfile.tpu, where the slice's service account can read it
#   ACCELERATOR_TYPE, RUNTIME_VERSION   of a slice that is created: v5litepod-16 and v2-alpha-tpuv5-lite by default
#   RUNS=/mnt/runs            a folder that all workers share, at the same path in the container
#   SETUP                     a command that every worker runs first, such as the one that mounts RUNS
#   RETRY_SECONDS=60          between attempts to create it
#   RESTARTS=3                after an error on a slice that is ready
#   PRINT_ONLY=1              print the commands instead of running them
#   MODULE                    run this module instead of lcm_jax.main
# A slice that was preempted is deleted and created again, and a run that was stopped with work left, or has lost a
# process (exit code 75), is started again, both without limit. It exits with 0 when the run is complete. Start it in
# tmux on a machine that stays up, such as a small VM: it is what starts the run again.
set -euo pipefail

: "${TPU_NAME:?set it to the name of the slice}" "${ZONE:?set it to the zone of the slice}"
: "${IMAGE:?set it to an image of launch/Dockerfile.tpu}"
accelerator=${ACCELERATOR_TYPE:-v5litepod-16} version=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
runs=${RUNS:-/mnt/runs} restarts=${RESTARTS:-3} pause=${RETRY_SECONDS:-60}
tpu=(gcloud compute tpus tpu-vm)

run() {
  if [ -n "${PRINT_ONLY:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
state() { "${tpu[@]}" list --zone="$ZONE" --filter="name~(^|/)$TPU_NAME\$" --format='value(state)'; }
create() {
  run "${tpu[@]}" create "$TPU_NAME" --zone="$ZONE" --accelerator-type="$accelerator" --version="$version" --spot
}

# What every worker runs. The container of an earlier start goes first: it may have outlived its connection. The host's
# network is how the workers and the TPU's metadata are reached, its /dev/shm is what the workers that decode images
# share, a worker that shuts down leaves the run time to save, and models and compiled programs are kept in RUNS.
container=(
  sudo docker run --name=lcm_jax --rm --privileged --net=host --ipc=host --stop-timeout=120
  --volume="$runs:$runs" --env="HF_HOME=$runs/huggingface" --env="XDG_CACHE_HOME=$runs/cache"
  --env="MODULE=${MODULE:-lcm_jax.main}" "$IMAGE" launch/tpu "$@"
)
worker="${SETUP:-true} && { sudo docker rm --force lcm_jax >/dev/null 2>&1 || true; }"
worker+=" && $(printf '%q ' "${container[@]}")"
start() {
  # A worker that is gone closes its connection within two minutes.
  run "${tpu[@]}" ssh "$TPU_NAME" --zone="$ZONE" --worker=all --ssh-flag=-oServerAliveInterval=30 --command="$worker"
}

if [ -n "${PRINT_ONLY:-}" ]; then
  create
  start
  exit
fi
while true; do
  now=$(state)
  case $now in
    READY) ;;
    '' | PREEMPTED | TERMINATED | STOPPED)
      echo "$TPU_NAME is ${now:-not there}; creating it"
      [ -z "$now" ] || "${tpu[@]}" delete "$TPU_NAME" --zone="$ZONE" --quiet
      until create; do
        echo "$TPU_NAME cannot be created now; the next attempt is in $pause s"
        sleep "$pause"
      done
      ;;
    *)  # being created, repaired or restarted
      echo "$TPU_NAME is $now; the next look is in $pause s"
      sleep "$pause"
      continue
      ;;
  esac
  code=0
  start || code=$?
  if [ "$code" = 0 ]; then
    exit 0
  elif [ "$code" = 75 ]; then
    echo "stopped with work left; starting again"
  elif [ "$(state)" = READY ]; then  # not a preemption
    if [ "$restarts" = 0 ]; then
      echo "error: the run ended with exit code $code; see the lines above" >&2
      exit "$code"
    fi
    echo "the run ended with exit code $code; starting again, $restarts restarts left"
    restarts=$((restarts - 1))
  fi
done
