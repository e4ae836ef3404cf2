"""Who may do what: logins, forms that are ours, rates, and the headers of every page."""

from __future__ import annotations

import hmac
from typing import Any

import argon2
from starlette.requests import Request
from starlette.responses import Response

from steersman.types import SteersmanError

COOKIE = "steersman"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LARGEST_BODY = 1 << 20
SHORTEST_PASSWORD = 10
LIMITS = {"login": (10, 60.0), "login-name": (10, 60.0), "post": (120, 60.0)}
"""How many requests in how many seconds one client may send; `login-name`: all clients together for one name."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Headers by which proxies say for whom they ask."""
_hasher = argon2.PasswordHasher()
_NOBODY = _hasher.hash("nobody's password, so that an unknown name takes as long as a wrong password")


def hashed(password: str) -> str:
    return _hasher.hash(password)


def checked_password(password: str) -> str:
    """The password. Raises SteersmanError where it is too short."""
    if len(password) < SHORTEST_PASSWORD:
        raise SteersmanError(f"a password has at least {SHORTEST_PASSWORD} characters")
    return password


def right_password(stored: str | None, given: str) -> bool:
    """Whether the password is the stored one; it takes as long where there is none."""
    try:
        return _hasher.verify(stored or _NOBODY, given) and stored is not None
    except argon2.exceptions.VerificationError:
        return False


def fits(request: Request) -> bool:
    """Whether a form says its size, and is small enough."""
    size = request.headers.get("content-length", "")
    return size.isascii() and size.isdigit() and len(size) < 10 and int(size) <= LARGEST_BODY


def is_same_site(request: Request) -> bool:
    """Whether the browser names no other site as the one that a form comes from."""
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def is_forwarded(request: Request) -> bool:
    """Whether a proxy says that it asks for somebody else."""
    return any(name in request.headers for name in FORWARDED)


def has_token(form: Any, csrf: str) -> bool:
    """Whether a form holds the login's token, and so comes from a page of ours."""
    return same_secret(str(form.get("csrf", "")), csrf)


def same_secret(given: str, secret: str) -> bool:
    """Whether they are the same; the time that it takes does not tell how much of it is."""
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


def set_login(response: Response, request: Request, token: str) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age=14 * 24 * 3600, httponly=True, samesite="strict", secure=secure)
