"""The address at which this machine listens, and the GPUs that the numbers in a configuration select."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

from megatron_tempo.config.hosts import ip_of, is_loopback
from megatron_tempo.errors import InputError

_FIELD = "rollout.servers.host"


def own_address(host: str) -> str:
    """The IPv4 address that `rollout.servers.host` stands for on this machine.

    `hostname` means the machine's own name. If that name has no address, or only one that other machines cannot
    reach (Debian's 127.0.1.1), the result is the address by which this machine reaches the network. Raises InputError.
    """
    is_own = host == "hostname"
    name = socket.gethostname() if is_own else host
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError) as error:
        outward = _outward_address() if is_own else None
        if outward is not None:
            return outward
        fix = "give an IPv4 address of this machine, or a name that has one here"
        if (ip := ip_of(host)) is not None and ip.version == 6:
            raise InputError(
                f"{_FIELD}={host} is an IPv6 address, which the engines' stores do not use: {fix}"
            ) from error
        setting = f"{_FIELD}={host}" if not is_own else f"{_FIELD}=hostname: this machine's name {name}"
        raise InputError(f"{setting} has no IPv4 address here ({error}): {fix}") from error
    return (_outward_address() or address) if is_own and is_loopback(address) else address


def _outward_address() -> str | None:
    """The address of the interface with the default route. Nothing is sent: 192.0.2.1 is reserved (RFC 5737)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The GPUs of CUDA_VISIBLE_DEVICES, numbers or UUIDs, in the order that CUDA counts them. None: all of them."""
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    devices = []
    for word in text.split(","):
        if not word.strip() or word.strip().startswith("-"):  # CUDA looks no further
            break
        devices.append(word.strip())
    return devices


def chosen_devices(numbers: Sequence[int], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES at these positions, counted as a process here counts its GPUs.

    >>> chosen_devices([2, 3], {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    ['6', '7']

    Raises InputError for a number that this job has no GPU for.
    """
    visible = visible_devices(environment)
    if visible is None:
        return [str(number) for number in numbers]
    if absent := [number for number in numbers if number >= len(visible)]:
        raise InputError(
            f"rollout.servers.devices={list(numbers)}: there is no GPU {absent[0]}: CUDA_VISIBLE_DEVICES="
            f"{','.join(visible)} shows {len(visible)} here, counted from 0; give numbers below {len(visible)}"
        )
    return [visible[number] for number in numbers]
