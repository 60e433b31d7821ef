"""Hosts and addresses in the configuration, judged by their text: nothing is resolved here."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host's text is, None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host can be reached only from its own machine.

    >>> [is_loopback(host) for host in ("localhost", "127.0.1.1", "::1", "10.0.0.5")]
    [True, True, True, False]
    """
    address = ip_of(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def host_of(url: str) -> str | None:
    """The host of `http://HOST:PORT/...`, without brackets; None if it is not an address with a valid port."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # an unmatched bracket, a port above 65535
        return None
    return parts.hostname if usable else None
