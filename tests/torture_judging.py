"""What the sessions of an order may not meet, and what may not come about, by what they do and how it begins."""

from __future__ import annotations

from decimal import Decimal

from torture_operations import BYPASSES, DEADLOCK, FROZEN, GONE, MIRRORING, REJECTED, STEADY, TAKING, UNSEEN
from torture_scheduler import Order, Player
from torture_steps import Scene

BALANCES = {
    "absent": Decimal(100),
    "mirrored": Decimal(100),
    "stale": Decimal(101),
    "frozen": Decimal(105),
    "closed": Decimal(0),
}
"""What is true of A and B at the start, by state."""

_OF_TRIGGERS = frozenset({DEADLOCK, FROZEN, "WM020"})
"""What an application's trigger that writes rows of its own can bring about."""


def unlike_the_mode(order: Order, scene: Scene, players: list[Player], after: set[str | None]) -> list[str]:
    """What mirror or reject alone would not have let come about."""
    done = {player.actor.operation for player in players}
    before = {word for word in order.start.split("+") if word in BALANCES}
    if scene.role or scene.stopped:
        return []
    if scene.modes == {"mirror"} and done <= STEADY and not before & {"stale", "closed"} and "stale" in after:
        return ["an account that mirror follows turned stale"]
    if scene.modes == {"reject"} and done <= STEADY | BYPASSES and before == {"mirrored"}:
        passed = [p for p in players if p.actor.operation in BYPASSES and p.committed and any(p.effects)]
        return [f"session {p.number} ({p.actor.operation}) was not rejected" for p in passed]
    return []


def unexpected(order: Order, scene: Scene, players: list[Player]) -> list[str]:
    """Errors and refusals that a session may not meet, or for which nothing in this order gives a reason."""
    problems = []
    for player in players:
        allowed = set(player.operation.allowed)
        others = [other for other in players if other is not player]
        if player.actor.level == "ser" or (player.actor.level == "rr" and any(map(_left_something, others))):
            allowed.add("40001")
        allowed -= _without_reason(order, player, others)
        if scene.role:
            allowed |= _OF_TRIGGERS
        if "reject" in scene.modes and (
            scene.role or (FROZEN in player.operation.allowed and _mirrored(order, players))
        ):
            allowed.add(REJECTED)
        if player.outcome and player.outcome not in allowed:
            problems.append(f"session {player.number} ({player.actor.operation}) got {player.outcome}")
        if player.operation.passed_on and not player.outcome:
            problems.append(f"session {player.number} ({player.actor.operation}) heard nothing of the error")
    return problems


def _without_reason(order: Order, player: Player, others: list[Player]) -> set[str]:
    """Of what a session may meet, that for which neither the start nor what was committed gives a reason."""
    words = set(order.start.split("+"))
    begun = {other.actor.operation for other in others}
    done = {other.actor.operation for other in others if other.committed} | {player.actor.operation}
    reasons = {
        # Rolled back or not: the phase is frozen, in which an account is opened as frozen.
        FROZEN: words & {"frozen"} or begun & {"freeze"},
        GONE: words & {"closed"} or done & TAKING,
        UNSEEN: player.actor.level != "rc",
    }
    return {error for error, found in reasons.items() if not found}


def _mirrored(order: Order, players: list[Player]) -> bool:
    """Whether an account is mirrored at the start, or may have become so."""
    made = {player.actor.operation for player in players} & MIRRORING
    return "mirrored" in order.start.split("+") or bool(made)


def _left_something(player: Player) -> bool:
    """Whether something is committed that an older snapshot does not see."""
    return player.committed or bool(player.operation.before)


def twice(players: list[Player]) -> list[str]:
    """Whether operations that share their keys moved more than one of them would."""
    sharing = [player for player in players if player.operation.once is not None and player.committed]
    moved = sum(change for player in sharing for effect in player.effects for change in effect.values())
    limit = max((player.operation.once or 0 for player in sharing), default=0)
    return [f"under one key {moved} moved instead of {limit}"] if moved > limit else []
