"""Addresses that a server listens on: whether other machines reach them, and the names that they are called by."""

from __future__ import annotations

import ipaddress
import os


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> list[str]:
    """The names by which a request may call a server that listens on an address.

    On a loopback address they are this machine's own, so that no page of another site reaches the server by a name of
    its own; elsewhere it is any name (`*`).
    """
    return ["127.0.0.1", "localhost", "[::1]", in_url(host)] if is_loopback(host) else ["*"]


def trusted_proxies() -> str:
    """The addresses of proxies whose X-Forwarded headers are believed, for uvicorn: what `FORWARDED_ALLOW_IPS` names,
    and none where it is not set. uvicorn's own default is this machine, on which any program may write any client's
    address into its requests."""
    return os.environ.get("FORWARDED_ALLOW_IPS", "")


def in_url(host: str) -> str:
    """An address as it stands in a URL: one of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
