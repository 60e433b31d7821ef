#!/bin/sh
# Builds the CPU image with docker, podman or buildah, and runs a shortened quickstart in it.
# CPU_IMAGE: the base image. BUILD_OPTIONS: more options for the builder. Without a builder or a base image nothing can be
# built. This is an error, except in CI (CI=true), where the machine may have neither.
set -eu
cd "$(dirname "$0")/.."
cpu_image=${CPU_IMAGE:-python:3.11-slim}
tag=megatron-tempo:cpu
quickstart="train experiment=quickstart stage1.iterations=3 stage1.critic.warmup_iterations=1 stage2.iterations=3
    stage2.critic.warmup_iterations=1 evaluation.every=0"

not_built() {
    echo "docker-cpu: NOT BUILT: $1"
    [ "${CI:-}" = true ] && exit 0
    exit 1
}

if docker info > /dev/null 2>&1; then
    builder=docker
elif podman info > /dev/null 2>&1; then
    builder=podman
elif buildah version > /dev/null 2>&1; then
    builder=buildah
else
    not_built "this machine has neither a running docker nor podman nor buildah"
fi

case $builder in
buildah)
    [ -n "$(buildah images --quiet "$cpu_image" 2> /dev/null)" ] || timeout 300 buildah pull --quiet "$cpu_image" \
        || not_built "buildah has no image $cpu_image and cannot pull it"
    # shellcheck disable=SC2086  # several options
    buildah bud --isolation chroot --layers=false --build-arg IMAGE=cpu --build-arg CPU_IMAGE="$cpu_image" \
        ${BUILD_OPTIONS:-} --tag "$tag" .
    container=$(buildah from --pull-never "localhost/$tag")
    trap 'buildah rm "$container" > /dev/null' EXIT
    # shellcheck disable=SC2086  # several arguments
    buildah run --isolation chroot "$container" -- megatron-tempo $quickstart
    ;;
*)
    [ -n "$($builder images --quiet "$cpu_image")" ] || timeout 300 $builder pull "$cpu_image" \
        || not_built "$builder has no image $cpu_image and cannot pull it"
    # shellcheck disable=SC2086  # several options
    $builder build --build-arg IMAGE=cpu --build-arg CPU_IMAGE="$cpu_image" ${BUILD_OPTIONS:-} --tag "$tag" .
    # shellcheck disable=SC2086  # several arguments
    $builder run --rm "$tag" $quickstart
    ;;
esac
echo "docker-cpu: built $tag with $builder on $cpu_image, and ran the quickstart in it"
