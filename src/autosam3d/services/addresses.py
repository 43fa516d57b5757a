"""Addresses that a service listens on: whether only this machine can reach one, and why listening failed."""

from __future__ import annotations

import errno
import ipaddress

from autosam3d.errors import UsageError

_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost counts as foreign."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def no_such_address(host: str, error: OSError) -> UsageError:
    """ADDRESS, for a host name that is not known."""
    return UsageError("ADDRESS", f"--host {host}", f"expected an address of this machine ({error.strerror})",
                      "try 127.0.0.1")


def cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    """PORT_IN_USE or ADDRESS, for the operating system's error when listening failed."""
    if error.errno == errno.EADDRINUSE:
        return UsageError("PORT_IN_USE", f"--port {port}", "another program listens there",
                          "stop it, or name another --port (0 takes a free one)")
    if error.errno in _NOT_HERE:
        return UsageError("ADDRESS", f"--host {host}", "this machine has no such address", "try 127.0.0.1")
    return UsageError("ADDRESS", f"--host {host} --port {port}", f"cannot listen there ({error.strerror})",
                      "name a port above 1023")
