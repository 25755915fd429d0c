"""A server on loopback that answers as Flagsmith's does: environment document, Admin API, and its faults."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from walletmigrate.flags import ALL_FLAGS, Json

ENVIRONMENT_KEY = "ser.key-of-the-environment"
ADMIN_KEY = "key-of-the-admin"
CLIENT_KEY = "env-client-key"
PROJECT = 7
FIRST_SEGMENT = 500
PATIENCE = 20.0


@dataclass
class Fault:
    """What goes wrong with calls of ``method`` whose path matches: a status, a hang, or an answer that is lost.

    ``done`` is whether the server carries the call out first. It begins ``after`` calls and is over after ``times``.
    """

    method: str
    path: str
    status: int = 0
    hang: bool = False
    done: bool = False
    after: int = 0
    times: int = 1000


@dataclass
class Project:
    """What the server holds, in its own terms."""

    features: dict[int, str] = field(default_factory=lambda: {n + 31: name for n, name in enumerate(ALL_FLAGS)})
    defaults: dict[int, bool] = field(default_factory=dict)
    segments: dict[int, Json] = field(default_factory=dict)
    overrides: dict[int, dict[int, Json]] = field(default_factory=dict)
    identities: dict[int, str] = field(default_factory=dict)
    states: dict[int, Json] = field(default_factory=dict)
    environment: str = "dev"
    change_requests: int | None = None
    """The status with which writes are refused while change requests are on."""


class FlagsmithStub(ThreadingHTTPServer):
    """The server. ``project`` is its state, ``calls`` the (method, path) it got, ``faults`` what it does wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.project = Project()
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []
        self.environment_keys = {ENVIRONMENT_KEY}
        self.admin_keys = {ADMIN_KEY}
        self._succeeded: dict[str, tuple[set[str], str]] = {}
        self.ended = threading.Event()
        self.lock = threading.RLock()

    @property
    def api_url(self) -> str:
        """What goes into the configuration."""
        return f"http://127.0.0.1:{self.server_address[1]}/api/v1/"

    @property
    def writes(self) -> list[tuple[str, str]]:
        """The calls that were not only reads."""
        return [call for call in self.calls if call[0] != "GET"]

    def succeed(self, keys: set[str], old: str, new: str) -> None:
        """Take a second key. Whoever holds the dashboard withdraws the old one once the new one has been used."""
        keys.add(new)
        self._succeeded[new] = (keys, old)

    def knows(self, keys: set[str], key: str) -> bool:
        """Whether one of the keys was sent."""
        if key not in keys:
            return False
        others, old = self._succeeded.pop(key, (keys, ""))
        others.discard(old)
        return True

    def flag(self, name: str) -> int:
        """The id of a feature."""
        return next(number for number, known in self.project.features.items() if known == name)

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Let calls fail from now on."""
        self.faults.append(Fault(method, path, **how))

    def fault(self, method: str, path: str) -> Fault | None:
        """What goes wrong with a call now."""
        for fault in [one for one in self.faults if one.method == method and re.search(one.path, path)]:
            if fault.after:
                fault.after -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self.faults.remove(fault)
            return fault
        return None

    def add_segment(self, name: str, operator: str, path: str, value: str) -> int:
        """A segment that somebody made in the dashboard."""
        number = FIRST_SEGMENT + len(self.project.segments)
        conditions = [{"id": 9, "operator": operator, "property": path, "value": value}]
        rules = [{"id": 1, "type": "ALL", "conditions": [], "rules": [{"type": "ANY", "conditions": conditions}]}]
        self.project.segments[number] = {"id": number, "name": name, "project": PROJECT, "rules": rules}
        return number

    def override(self, flag: str, segment: int, enabled: bool, priority: int) -> None:
        """An override that somebody made in the dashboard."""
        self.project.overrides.setdefault(self.flag(flag), {})[segment] = {"enabled": enabled, "priority": priority}

    def document(self) -> Json:
        """The environment document."""
        project = self.project
        segments = [
            {
                "id": number,
                "name": segment["name"],
                "rules": [_in_document(rule) for rule in segment["rules"]],
                "feature_states": [
                    self._state(feature, one["enabled"], {"priority": one["priority"]})
                    for feature, overrides in project.overrides.items()
                    for of, one in overrides.items()
                    if of == number
                ],
            }
            for number, segment in project.segments.items()
        ]
        identities = [
            {
                "identifier": identifier,
                "environment_api_key": CLIENT_KEY,
                "identity_uuid": f"00000000-0000-4000-8000-{number:012d}",
                "created_date": "2026-01-01T00:00:00+00:00",
                "identity_traits": [],
                "identity_features": features,
            }
            for number, identifier in project.identities.items()
            if (
                features := [
                    self._state(one["feature"], one["enabled"], None)
                    for one in project.states.values()
                    if one["identity"] == number
                ]
            )
        ]
        return {
            "id": 1,
            "api_key": CLIENT_KEY,
            "name": project.environment,
            "updated_at": "2026-01-01T00:00:00+00:00",
            "project": {
                "id": PROJECT,
                "name": "wallet",
                "hide_disabled_flags": False,
                "organisation": {"id": 1, "name": "lab", "feature_analytics": False},
                # As the server does it, a segment that no flag of the environment uses is not part of it.
                "segments": [segment for segment in segments if segment["feature_states"]],
            },
            "feature_states": [
                self._state(number, project.defaults.get(number, False), None) for number in project.features
            ],
            "identity_overrides": identities,
        }

    def _state(self, feature: int, enabled: bool, segment: Json | None) -> Json:
        return {
            "feature": {"id": feature, "name": self.project.features[feature], "type": "STANDARD"},
            "enabled": enabled,
            "feature_state_value": None,
            "django_id": feature,
            "featurestate_uuid": f"00000000-0000-4000-8000-{feature:012d}",
            "feature_segment": segment,
            "multivariate_feature_state_values": [],
        }


class _Refused(Exception):
    def __init__(self, status: int, detail: object) -> None:
        super().__init__(status)
        self.status = status
        self.detail = detail


class _Handler(BaseHTTPRequestHandler):
    server: FlagsmithStub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server, path = self.server, urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        server.calls.append((self.command, path.path))
        fault = server.fault(self.command, path.path)
        status, answer = 0, None
        if fault is None or fault.done:
            status, answer = self._carry_out(unquote(path.path), parse_qs(path.query), body)
        if fault is not None:
            if fault.hang:
                server.ended.wait(PATIENCE)
                return
            if not fault.status:
                return  # the connection ends without an answer
            status, answer = fault.status, {"detail": "as the test wants"}
        self._send(status, answer)

    def _carry_out(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, object]:
        try:
            with self.server.lock:
                self._authorize(path)
                for method, pattern, act in _ROUTES:
                    found = re.fullmatch(pattern, path)
                    if method == self.command and found:
                        return act(self.server, query, copy.deepcopy(body), *(int(one) for one in found.groups()))
            raise _Refused(404, {"detail": "Not found."})
        except _Refused as refused:
            return refused.status, refused.detail

    def _authorize(self, path: str) -> None:
        if path == "/api/v1/environment-document/":
            if not self.server.knows(self.server.environment_keys, self.headers.get("X-Environment-Key", "")):
                raise _Refused(403, {"detail": "Invalid or missing Environment Key"})
            return
        if not self.server.knows(
            self.server.admin_keys, self.headers.get("Authorization", "").removeprefix("Api-Key ")
        ):
            raise _Refused(401, {"detail": "Invalid token."})
        requests = self.server.project.change_requests
        if requests is not None and self.command != "GET" and "/environments/" in path:
            raise _Refused(requests, {"detail": "Cannot update flags in an environment with change requests enabled."})

    def _send(self, status: int, answer: object) -> None:
        body = b"" if answer is None else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def _page(rows: list[Json], query: dict[str, list[str]]) -> tuple[int, object]:
    size, page = int(query.get("page_size", ["10"])[0]), int(query.get("page", ["1"])[0])
    part = rows[(page - 1) * size : page * size]
    more = "http://elsewhere.invalid/next" if page * size < len(rows) else None
    return 200, {"count": len(rows), "next": more, "previous": None, "results": part}


def _flag_of(server: FlagsmithStub, feature: int) -> Json:
    overrides = server.project.overrides.get(feature, {})
    ranked = sorted(overrides.items(), key=lambda one: (one[1]["priority"], one[0]))
    return {
        "environment_default": {"enabled": server.project.defaults.get(feature, False), "value": None, "variants": []},
        "segment_overrides": [{"segment": {"id": of}, **one, "value": None, "variants": []} for of, one in ranked],
    }


def _get_flag(server: FlagsmithStub, _query: object, _body: object, feature: int) -> tuple[int, object]:
    return 200, _flag_of(server, feature)


def _patch_flag(server: FlagsmithStub, _query: object, body: Json, feature: int) -> tuple[int, object]:
    if feature not in server.project.features:
        raise _Refused(404, {"detail": "Not found."})
    overrides = copy.deepcopy(server.project.overrides.get(feature, {}))
    for position, one in enumerate(body.get("segment_overrides", [])):
        number = one["segment"]["id"]
        if number not in server.project.segments:
            raise _Refused(400, {"segment_overrides": ["Segment not found."]})
        changed = overrides.setdefault(number, {"enabled": False, "priority": position})
        changed.update({name: one[name] for name in ("enabled", "priority") if name in one})
    priorities = [one["priority"] for one in overrides.values()]
    if len(set(priorities)) != len(priorities):
        raise _Refused(400, {"detail": "Segment overrides must not share a priority."})
    server.project.overrides[feature] = overrides
    if "environment_default" in body:
        server.project.defaults[feature] = body["environment_default"]["enabled"]
    return 200, _flag_of(server, feature)


def _drop_override(
    server: FlagsmithStub, _query: object, _body: object, feature: int, segment: int
) -> tuple[int, object]:
    overrides = server.project.overrides.get(feature, {})
    if segment not in overrides:
        raise _Refused(404, {"detail": "Segment override not found."})
    gone = overrides.pop(segment)["priority"]
    for one in overrides.values():
        one["priority"] -= one["priority"] > gone
    return 204, None


def _list_segments(server: FlagsmithStub, query: dict[str, list[str]], _body: object) -> tuple[int, object]:
    return _page(list(server.project.segments.values()), query)


def _make_segment(server: FlagsmithStub, _query: object, body: Json) -> tuple[int, object]:
    _check_conditions(body["rules"])
    number = FIRST_SEGMENT + len(server.project.segments)
    server.project.segments[number] = {"id": number, **body}
    return 201, server.project.segments[number]


def _get_segment(server: FlagsmithStub, _query: object, _body: object, segment: int) -> tuple[int, object]:
    return 200, server.project.segments[segment]


def _put_segment(server: FlagsmithStub, _query: object, body: Json, segment: int) -> tuple[int, object]:
    if not {"name", "project", "rules"} <= body.keys():
        raise _Refused(400, {"detail": "whole body, please"})
    _check_conditions(body["rules"])
    server.project.segments[segment] = body
    return 200, body


def _check_conditions(rules: list[Json]) -> None:
    for rule in rules:
        for condition in rule.get("conditions") or ():
            if not condition.get("property"):
                raise _Refused(400, {"property": ["This field may not be blank."]})
        _check_conditions(rule.get("rules") or [])


def _list_identities(server: FlagsmithStub, query: dict[str, list[str]], _body: object) -> tuple[int, object]:
    wanted = query.get("q", [""])[0]
    exact = wanted.startswith('"') and wanted.endswith('"')
    rows = [
        {"id": number, "identifier": name}
        for number, name in server.project.identities.items()
        if (name == wanted.replace('"', "") if exact else wanted in name)
    ]
    return _page(rows, query)


def _make_identity(server: FlagsmithStub, _query: object, body: Json) -> tuple[int, object]:
    if body["identifier"] in server.project.identities.values():
        raise _Refused(400, {"detail": "The fields environment, identifier must make a unique set."})
    number = 900 + len(server.project.identities)
    server.project.identities[number] = body["identifier"]
    return 201, {"id": number, "identifier": body["identifier"]}


def _list_states(
    server: FlagsmithStub, query: dict[str, list[str]], _body: object, identity: int
) -> tuple[int, object]:
    rows = [{"id": number, **one} for number, one in server.project.states.items() if one["identity"] == identity]
    return _page(rows, query)


def _make_state(server: FlagsmithStub, _query: object, body: Json, identity: int) -> tuple[int, object]:
    if any((one["identity"], one["feature"]) == (identity, body["feature"]) for one in server.project.states.values()):
        raise _Refused(400, {"detail": "Feature state already exists."})
    number = 700 + len(server.project.states)
    server.project.states[number] = {"identity": identity, **body}
    return 201, {"id": number, **server.project.states[number]}


def _patch_state(server: FlagsmithStub, _query: object, body: Json, _identity: int, state: int) -> tuple[int, object]:
    server.project.states[state]["enabled"] = body["enabled"]
    return 200, {"id": state, **server.project.states[state]}


def _drop_state(server: FlagsmithStub, _query: object, _body: object, _identity: int, state: int) -> tuple[int, object]:
    del server.project.states[state]
    return 204, None


def _classic(_server: FlagsmithStub, _query: object, _body: object, _state: int) -> tuple[int, object]:
    return 500, {"detail": "the classic call for a segment's feature state is broken"}


def _document(server: FlagsmithStub, _query: object, _body: object) -> tuple[int, object]:
    return 200, server.document()


_FLAG = rf"/api/__future__/environments/{CLIENT_KEY}/features/(\d+)/"
_SEGMENTS = rf"/api/v1/projects/{PROJECT}/segments/"
_IDENTITIES = rf"/api/v1/environments/{CLIENT_KEY}/identities/"
_STATES = _IDENTITIES + r"(\d+)/featurestates/"

_ROUTES: list[tuple[str, str, Callable[..., tuple[int, object]]]] = [
    ("GET", "/api/v1/environment-document/", _document),
    ("GET", _FLAG, _get_flag),
    ("PATCH", _FLAG, _patch_flag),
    ("DELETE", _FLAG + r"segment-overrides/(\d+)/", _drop_override),
    ("GET", _SEGMENTS, _list_segments),
    ("POST", _SEGMENTS, _make_segment),
    ("GET", _SEGMENTS + r"(\d+)/", _get_segment),
    ("PUT", _SEGMENTS + r"(\d+)/", _put_segment),
    ("GET", _IDENTITIES, _list_identities),
    ("POST", _IDENTITIES, _make_identity),
    ("GET", _STATES, _list_states),
    ("POST", _STATES, _make_state),
    ("PATCH", _STATES + r"(\d+)/", _patch_state),
    ("DELETE", _STATES + r"(\d+)/", _drop_state),
    ("PATCH", rf"/api/v1/environments/{CLIENT_KEY}/featurestates/(\d+)/", _classic),
]


def _in_document(rule: Json) -> Json:
    conditions = [
        {"operator": one["operator"], "property_": one.get("property"), "value": one["value"]}
        for one in rule.get("conditions") or ()
    ]
    return {
        "type": rule["type"],
        "conditions": conditions,
        "rules": [_in_document(inner) for inner in rule.get("rules") or ()],
    }


@contextmanager
def running() -> Iterator[FlagsmithStub]:
    """Run the server in a thread."""
    with FlagsmithStub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
