#!/usr/bin/env bash
# A Docker engine and the runner image, where there is none: for continuous integration and bare machines.
#
# Where `docker info` answers, the engine is left as it is. Else, as root on Debian or Ubuntu, one is installed from the
# distribution and started in the background, with gVisor as the runtime "runsc". It ends with the machine, or by its
# process id, which is written to /run/rlm-sandbox-dockerd.pid.
#
#   scripts/docker_engine.sh          the engine
#   scripts/docker_engine.sh base     also a base image without a registry (debootstrap); prints its name
#   scripts/docker_engine.sh tests    also what the tests need beside it: ps, openssl, and a server of ssh, which is not started
set -euo pipefail

BASE_TAG="rlm-sandbox-base:bookworm"
state=/run/rlm-sandbox-docker
suite=bookworm
policy=/usr/sbin/policy-rc.d

say() { echo "docker_engine: $*" >&2; }

# install PACKAGE...: without starting what they would start. The engine's package would start one that knows no gVisor, and
# ours could not start beside it.
install() {
    say "installing $*"
    if [[ ! -e "$policy" ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
    fi
    apt-get update -qq
    local done=0
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2 || done=$?
    if [[ -n "$(trap -p EXIT)" ]]; then
        rm -f "$policy"
        trap - EXIT
    fi
    return "$done"
}

install_packages() {
    local wanted=()
    command -v dockerd >/dev/null || wanted+=(docker.io iptables)
    command -v runsc >/dev/null || wanted+=(runsc)
    command -v debootstrap >/dev/null || wanted+=(debootstrap)
    [[ ${#wanted[@]} -eq 0 ]] && return
    # Not every release has gVisor; the engine works without it.
    install "${wanted[@]}" || install docker.io iptables debootstrap
}

is_engine() { [[ -r "/proc/$1/comm" && "$(cat "/proc/$1/comm")" == dockerd ]]; }

start_engine() {
    mkdir -p "$state"
    local before
    before="$(cat /var/run/docker.pid 2>/dev/null || true)"
    for _ in $(seq 60); do # one that is just ending keeps its pid file until its containers are gone
        [[ -n "$before" ]] && is_engine "$before" || break
        sleep 0.5
    done
    # One that was killed leaves the file, and the number may be another process's by now, which an engine would take for one that runs.
    [[ -n "$before" ]] && ! is_engine "$before" && rm -f /var/run/docker.pid
    local runtimes='{}'
    # This runtime has no network of its own to offer, and works where neither KVM nor systrap does.
    if command -v runsc >/dev/null; then
        runtimes='{"runsc": {"path": "'"$(command -v runsc)"'", "runtimeArgs": ["--network=none", "--platform=ptrace"]}}'
    fi
    echo '{"runtimes": '"$runtimes"', "storage-driver": "overlay2"}' > "$state/daemon.json"
    # Started by hand: packages may be forbidden to start services (policy-rc.d).
    setsid dockerd --config-file "$state/daemon.json" > "$state/dockerd.log" 2>&1 < /dev/null &
    echo "$!" > /run/rlm-sandbox-dockerd.pid
    for _ in $(seq 120); do
        docker info >/dev/null 2>&1 && return
        kill -0 "$(cat /run/rlm-sandbox-dockerd.pid)" 2>/dev/null || break
        sleep 0.5
    done
    say "the engine did not start:"
    tail -n 20 "$state/dockerd.log" >&2
    exit 1
}

if ! docker info >/dev/null 2>&1; then
    if [[ "$(id -u)" -ne 0 ]] || ! command -v apt-get >/dev/null; then
        say "no Docker engine answers, and only root on Debian or Ubuntu can install one here; start Docker and try again"
        exit 1
    fi
    install_packages
    start_engine
    say "started $(docker info --format '{{.ServerVersion}} with runtimes {{range $name, $_ := .Runtimes}}{{$name}} {{end}}')"
fi

if [[ "${1:-}" == base ]]; then
    if ! docker image inspect "$BASE_TAG" >/dev/null 2>&1; then
        command -v debootstrap >/dev/null || install_packages
        rootfs="$(mktemp -d)"
        trap 'rm -rf "$rootfs"' EXIT
        say "making $BASE_TAG (about a minute)"
        debootstrap --variant=minbase --include=python3-minimal,libpython3-stdlib "$suite" "$rootfs" >&2
        rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/*
        tar -C "$rootfs" -c . | docker import - "$BASE_TAG" >&2
    fi
    echo "$BASE_TAG"
fi

if [[ "${1:-}" == tests ]]; then
    wanted=()
    [[ -x /usr/sbin/sshd ]] || wanted+=(openssh-server openssh-client)
    command -v openssl >/dev/null || wanted+=(openssl)
    command -v ps >/dev/null || wanted+=(procps)
    [[ ${#wanted[@]} -eq 0 ]] || install "${wanted[@]}"
fi
