"""How all requests to servers are made. No torch: `answer_worker.py` imports this."""

from __future__ import annotations

import httpx

# Clients of servers are made with `trust_env=False`: a proxy of the login shell does not know a run's own servers.
# Servers close a connection that was idle for 5 s. Reusing one at that moment fails, so clients close it earlier.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
CONNECT_SECONDS = 30.0


def authorised(key: str) -> dict[str, str]:
    """The header of every request to a server."""
    return {"Authorization": f"Bearer {key}"}


def client_of(url: str, key: str, seconds: float) -> httpx.AsyncClient:
    """A client of a server that waits at most `seconds` for each answer."""
    timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
    return httpx.AsyncClient(base_url=url, headers=authorised(key), timeout=timeout, limits=LIMITS, trust_env=False)
