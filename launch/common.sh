# shellcheck shell=bash disable=SC2034,SC2153
# Functions that the job scripts in this folder share. The scripts set the variables in capitals.

asked=''   # set when the job is asked to stop
trapped='' # set when a trap has just run
servers='' # the srun process that runs the rollout servers

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

# Load the modules, list the hosts, and set SETTINGS, the environment of all processes. It is part of their command line,
# because a container image's environment would override what srun passes on.
prepare() {
    if ((${#MODULES[@]})); then
        set +u # the site's functions may read variables that are not set
        # shellcheck disable=SC1091
        [[ $(type -t module) == function ]] || source /etc/profile
        module load "${MODULES[@]}"
        set -u
    fi
    mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    SETTINGS=(
        "PYTHONPATH=$CODE" PYTHONSAFEPATH=1 # only the snapshot, not the working folder, which may have changed
        "MASTER_ADDR=${HOSTS[0]}" "MASTER_PORT=$((15000 + SLURM_JOB_ID % 5000))"
        PYTHONUNBUFFERED=1 "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
        # models/device.py says why. torch reads the second one when it is imported.
        CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
    )
    if [[ $INTERFACE ]]; then SETTINGS+=("NCCL_SOCKET_IFNAME=$INTERFACE" "GLOO_SOCKET_IFNAME=$INTERFACE"); fi
    SETTINGS+=("${ENVIRONMENT[@]}")
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${HOSTS[*]}"
}

# step PROCESSES HOST ... -- ARGUMENTS: run this number of Python processes on each host. If one fails, all are ended. It
# replaces the shell, so start it as `step ... &` or `(step ...)`.
step() {
    local processes=$1 hosts=()
    shift
    while [[ $1 != -- ]]; do
        hosts+=("$1")
        shift
    done
    shift
    local options=(
        --nodes="${#hosts[@]}" --ntasks-per-node="$processes" --ntasks="$((processes * ${#hosts[@]}))"
        --nodelist="$(IFS=, && echo "${hosts[*]}")" --distribution=block --kill-on-bad-exit=1
        --cpu-bind=none # servers and verifiers that a process starts must be able to use other cores than its own
    )
    if [[ $GRES ]]; then options+=(--gres="$GRES"); fi
    # srun does not inherit this from the job.
    if ((CPUS)); then options+=(--cpus-per-task="$((CPUS / processes))"); fi
    if [[ $CONTAINER ]]; then
        options+=(--container-image="$CONTAINER" --container-mounts="$(IFS=, && echo "${MOUNTS[*]}")")
        options+=(--container-workdir="$WORK")
    fi
    exec srun "${options[@]}" --chdir="$WORK" env "${SETTINGS[@]}" bash "$CODE/launch/process.sh" "$PYTHON" "$@"
}

# await PROCESS: wait until it has ended, and return its exit code. A trap does not interrupt the wait.
await() {
    local code
    while true; do
        trapped='' code=0
        wait "$1" || code=$?
        if [[ ! $trapped ]]; then return "$code"; fi
    done
}

# Start rollout servers on the nodes after the trainer's, if there are any. Sets OVERRIDES for the trainer.
start_servers() {
    OVERRIDES=()
    if ((!ROLLOUT_NODES || !SERVERS)); then return 0; fi
    local folder=$JOB/servers/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} found=()
    mkdir -p "$JOB/servers"
    (umask 077 && mkdir -p "$folder/addresses") # logs there may tell the key
    (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$folder/key")
    step 1 "${HOSTS[@]:TRAIN_NODES}" -- -m megatron_tempo serve --config "$CONFIG" --folder "$folder" &
    servers=$!
    # Each server has START_SECONDS, which its own process measures. The 300 s are for srun and imports.
    local deadline=$((SECONDS + START_SECONDS + 300))
    while ((${#found[@]} < ROLLOUT_NODES * SERVERS)); do
        if [[ $asked ]]; then return 0; fi
        if ! kill -0 "$servers" 2>/dev/null || ((SECONDS > deadline)); then
            say "only ${#found[@]} of $((ROLLOUT_NODES * SERVERS)) rollout servers are ready: training does not start; logs: $folder"
            tail -n 15 "$folder"/*/*/*.log 2>/dev/null | grep -vFf "$folder/key" || true # a log may tell the key
            return 1
        fi
        sleep 1
        mapfile -t found < <(find "$folder/addresses" -type f ! -name '*.tmp' | sort)
    done
    local addresses
    addresses=$(sed "s/.*/'&'/" "${found[@]}" | paste -sd,)
    say "${#found[@]} rollout servers are ready: $addresses"
    local quoted=${folder//\'/\\\'} # as Hydra reads it between single quotes
    OVERRIDES=("rollout.servers.addresses=[$addresses]" "rollout.servers.key_file='$quoted/key'")
}

stop_servers() {
    if [[ $servers ]]; then
        kill "$servers" 2>/dev/null || true
        wait "$servers" 2>/dev/null || true
    fi
}
