"""Calls of Flagsmith's Admin API, as far as flags are switched by it. Source: the server's own API, as tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

from walletmigrate.errors import ConfigError, FlagServerRefused, FlagSourceUnreachable
from walletmigrate.flag_http import NoAnswer, call, server_name
from walletmigrate.flags import Json, read_document

PAGE_SIZE: Final = 100
MAX_PAGES: Final = 100
_DETAIL: Final = 200


class NotKnown(FlagSourceUnreachable):
    """There was no answer that says whether the server did what was asked."""


class AdminApi:
    """The server at ``api_url`` (ending in ``/api/v1/``), with both keys. Each call waits ``timeout_seconds`` at most.

    Calls raise `FlagSourceUnreachable` if nothing can have been done, `NotKnown` if it may have been, and
    `FlagServerRefused` if the server said no. ``what`` is what a call is for, as people say it.
    """

    def __init__(self, api_url: str, environment_key: str, admin_key: str, timeout_seconds: float = 5.0) -> None:
        self.name: Final = server_name(api_url)
        url = api_url.rstrip("/")
        if not url.endswith("/v1"):
            raise ConfigError("api_url does not end in /api/v1/", fix="write http://host:port/api/v1/")
        self._base = url.removesuffix("v1")
        self._environment_key = environment_key
        self._admin_key = admin_key
        self._timeout = timeout_seconds

    def document(self) -> Json:
        """The environment document, as processes get it."""
        what = "give the environment document"
        body = self._call("GET", "v1/environment-document/", what, {"X-Environment-Key": self._environment_key})
        return read_document(body, self.name)

    def flag(self, environment: str, feature: int) -> Json:
        """A flag's state: its default, and its overrides by segment with their priorities."""
        return self._asked("GET", _flag(environment, feature), f"read feature {feature}")

    def set_flag(self, environment: str, feature: int, changes: Json, what: str) -> None:
        """Switch a flag's default and overrides in one call; those that ``changes`` leaves out stay as they are."""
        self._asked("PATCH", _flag(environment, feature), what, changes)

    def drop_override(self, environment: str, feature: int, segment: int, what: str) -> None:
        """End a segment's override; one that is gone already is no error."""
        try:
            self._call("DELETE", f"{_flag(environment, feature)}segment-overrides/{segment}/", what, self._authorized)
        except FlagServerRefused as error:
            # A server that is too old for this call answers 404 as well.
            if error.status != 404 or self._stands(environment, feature, segment):
                raise

    def _stands(self, environment: str, feature: int, segment: int) -> bool:
        overrides = self.flag(environment, feature)["segment_overrides"]
        return any(one["segment"]["id"] == segment for one in overrides)

    def segments(self, project: int) -> Iterator[Json]:
        """All segments of the project."""
        return self._listed(f"v1/projects/{project}/segments/", "list the segments")

    def make_segment(self, project: int, name: str, rules: list[Json], what: str) -> int:
        """Make a segment; its id."""
        body = {"name": name, "project": project, "rules": rules}
        return int(self._asked("POST", f"v1/projects/{project}/segments/", what, body)["id"])

    def segment(self, project: int, segment: int) -> Json:
        """A segment's whole body."""
        return self._asked("GET", f"v1/projects/{project}/segments/{segment}/", f"read segment {segment}")

    def replace_segment(self, project: int, segment: int, body: Json, what: str) -> None:
        """Put a whole body in the place of a segment's."""
        self._asked("PUT", f"v1/projects/{project}/segments/{segment}/", what, body)

    def override_account(self, environment: str, account: str, feature: int, enabled: bool, what: str) -> None:
        """Switch a flag for one account, making the identity if the server does not know it."""
        identities = f"v1/environments/{quote(environment)}/identities/"
        identity = self._identity(identities, account)
        if identity is None:
            # An identity without overrides changes nothing, so it need not be taken back if the next call fails.
            identity = int(self._asked("POST", identities, what, {"identifier": account})["id"])
        states = f"{identities}{identity}/featurestates/"
        own = self._own_state(states, feature)
        if own is None:
            self._asked("POST", states, what, {"feature": feature, "enabled": enabled})
        else:
            self._asked("PATCH", f"{states}{own}/", what, {"enabled": enabled})

    def drop_account(self, environment: str, account: str, feature: int, what: str) -> None:
        """End an account's override; one that is gone already is no error."""
        identities = f"v1/environments/{quote(environment)}/identities/"
        identity = self._identity(identities, account)
        states = f"{identities}{identity}/featurestates/"
        own = None if identity is None else self._own_state(states, feature)
        if own is not None:
            self._call("DELETE", f"{states}{own}/", what, self._authorized)

    def _identity(self, path: str, account: str) -> int | None:
        # In quotation marks the server looks for exactly that; it cannot do so for a key that holds some.
        wanted = quote(account if '"' in account else f'"{account}"', safe="")
        found = [one for one in self._listed(f"{path}?q={wanted}", "find the account") if one["identifier"] == account]
        return int(found[0]["id"]) if found else None

    def _own_state(self, path: str, feature: int) -> int | None:
        for state in self._listed(path, "read the account's overrides"):
            of = state["feature"]
            if (of["id"] if isinstance(of, dict) else of) == feature:
                return int(state["id"])
        return None

    def _listed(self, path: str, what: str) -> Iterator[Json]:
        # By number: the address of the next page is the server's word, and would be given the key.
        mark = "&" if "?" in path else "?"
        for page in range(1, MAX_PAGES + 1):
            found = self._read("GET", f"{path}{mark}page_size={PAGE_SIZE}&page={page}", what)
            if isinstance(found, list):
                yield from found
                return
            yield from self._part(found, "results", what)
            if not found.get("next"):
                return

    def _part(self, found: Any, name: str, what: str) -> Any:
        if not isinstance(found, dict) or name not in found:
            raise FlagServerRefused(self.name, what, 200, f"its answer has no {name!r}")
        return found[name]

    def _asked(self, method: str, path: str, what: str, body: object = None) -> Json:
        found = self._read(method, path, what, body)
        if not isinstance(found, dict):
            raise FlagServerRefused(self.name, what, 200, "its answer is no JSON object")
        return found

    def _read(self, method: str, path: str, what: str, body: object = None) -> Any:
        answer = self._call(method, path, what, self._authorized, body)
        try:
            return json.loads(answer)
        except ValueError:
            raise NotKnown(self.name, f"asked to {what}, it gave an answer that is not JSON") from None

    @property
    def _authorized(self) -> dict[str, str]:
        return {"Authorization": f"Api-Key {self._admin_key}"}

    def _call(self, method: str, path: str, what: str, headers: dict[str, str], body: object = None) -> bytes:
        try:
            status, answer = call(method, self._base + path, headers, self._timeout, body)
        except NoAnswer as error:
            kind = NotKnown if error.sent and method != "GET" else FlagSourceUnreachable
            raise kind(self.name, f"asked to {what}, {error}") from None
        if status >= 500:
            kind = NotKnown if method != "GET" else FlagSourceUnreachable
            raise kind(self.name, f"asked to {what}, it answered {status}")
        if not 200 <= status < 300:
            key = "environment" if "X-Environment-Key" in headers else "admin"
            raise FlagServerRefused(self.name, what, status, _why(status, key, method, answer))
        return answer


def _flag(environment: str, feature: int) -> str:
    return f"__future__/environments/{quote(environment)}/features/{feature}/"


def _why(status: int, key: str, method: str, answer: bytes) -> str:
    variable = "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY" if key == "admin" else "WALLETMIGRATE_FLAGSMITH_KEY"
    change_requests = "make the change in Flagsmith by a change request, or switch change requests off there"
    if status == 409:
        return f"change requests are on for this environment: {change_requests}"
    if status == 403 and method != "GET":
        return f"either {variable} holds a key that may not write, or change requests are on: {change_requests}"
    if status in (401, 403):
        kind = "an Admin API key of the organisation" if key == "admin" else "a server-side key (ser.…)"
        return f"the {key} key is not accepted: set {variable} to {kind}"
    if status == 404:
        return "it knows nothing there: the key is of another organisation, or the server lacks this call (too old)"
    if 300 <= status < 400:
        return "it redirects, which is not followed; put its own address in api_url"
    said = "".join(one if one.isprintable() else " " for one in answer[:_DETAIL].decode(errors="replace"))
    return f"it says {said}"
