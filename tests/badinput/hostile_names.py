"""T13: names that try to lead elsewhere, to say something, to run something, or that no file system likes."""

from __future__ import annotations

NAMES = (
    "..", "../x", "../../../../tmp/x", "/etc/passwd", "//x", "\\..\\x", "C:\\x", "%2e%2e/%2e%2e/x", "%2e%2e%2fx",
    "..%2fx", "%252e%252e%252fx", "x%00.nii", "x\0.nii", "x\r\nSet-Cookie: a=b", "x\nX: y", "a" * 5000, "\u202exin",
    "CON", "nul.nii", "x.", "x ", " ", "-rf", "--help", "$(id)", "`id`", "|id", ";id", "*", "?", "~", "~root/x", ".",
    "./.", ".ssh/x", "jobs.sqlite", "../jobs.sqlite", "../../serve.lock", "upload", "scan.nii.gz", "\u00e9\u0301",
    "file:///etc/passwd", "http://127.0.0.1/", "<script>alert(1)</script>", "' OR 1=1 --", "\"; DROP TABLE jobs; --",
    "....//x", "..;/x", ".../x", "/proc/self/environ", "/dev/stdin", "\\\\host\\share\\x", "x:stream", "LPT1.nii.gz",
    "\x1b[2Jx", "\u2215etc\u2215passwd", "\uff0e\uff0e\uff0fx", "%c0%ae%c0%ae%c0%afx", "x\ty", "{x.__class__}", "%s%n",
    "${jndi:ldap://127.0.0.1/x}",
)
assert len(set(NAMES)) == len(NAMES) >= 60
