"""A booking shop with the adapter: every change of a balance goes through one door."""

from __future__ import annotations

import logging
import os
import uuid
from decimal import Decimal
from typing import Any

import structlog
from flask import Flask, abort, request
from models import Booking, User
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import create_engine, select
from sqlalchemy.orm import sessionmaker

from walletmigrate import LegacyBalanceAdapter
from walletmigrate.errors import InsufficientFunds, UnknownAccount
from walletmigrate.heartbeat import Heartbeat
from walletmigrate.observe import LogObserver, PrometheusObserver

app = Flask(__name__)
engine = create_engine(os.environ["SHOP_DATABASE_URL"])
Session = sessionmaker(engine)

logging.basicConfig(level=logging.INFO, format="%(message)s")
observers = (PrometheusObserver(CollectorRegistry()), LogObserver())
adapter = LegacyBalanceAdapter.from_config(observers=observers)
heartbeat = Heartbeat(adapter.settings, adapter.source, name="shop", observers=observers).start()


@app.before_request
def correlate() -> None:
    """The request's id stands in the log and in the ledger, where `walletmigrate trace` finds it."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(correlation_id=request.headers.get("X-Request-Id") or uuid.uuid4().hex)


@app.get("/metrics")
def metrics() -> Any:
    """What all workers counted together."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry), {"Content-Type": "text/plain; version=0.0.4"}


@app.post("/users")
def join() -> Any:
    """A new user, who begins with nothing."""
    with Session.begin() as session:
        user = User(tenant=request.get_json()["tenant"])
        session.add(user)
        session.flush()
        adapter.open_account(session, user.id)
        return {"user": user.id}, 201


@app.get("/users/<int:user_id>/balance")
def balance(user_id: int) -> Any:
    """What the user has."""
    with Session() as session:
        try:
            return {"balance": str(adapter.balance(session, user_id).amount)}
        except UnknownAccount:
            abort(404)


@app.post("/bookings")
def book() -> Any:
    """Pay for a place from the balance."""
    wanted = request.get_json()
    price = Decimal(wanted["price"])
    with Session.begin() as session:
        user = session.get(User, wanted["user"]) or abort(404)
        booking = Booking(user_id=user.id, price=price)
        session.add(booking)
        session.flush()
        try:
            adapter.debit(session, user.id, price, type="booking", reference=("booking", booking.id))
        except InsufficientFunds:
            abort(409)
        return {"booking": booking.id}, 201


@app.post("/bookings/<int:booking_id>/refund")
def refund(booking_id: int) -> Any:
    """Give the money back, once."""
    with Session.begin() as session:
        booking = session.get(Booking, booking_id, with_for_update=True) or abort(404)
        if booking.state == "refunded":
            abort(409)
        booking.state = "refunded"
        reference, key = ("booking", booking.id), f"refund:{booking.id}"
        adapter.credit(session, booking.user_id, booking.price, type="refund", reference=reference, idempotency_key=key)
        return {"booking": booking.id, "state": booking.state}


@app.post("/admin/balance")
def adjust() -> Any:
    """Put a balance right, as an administrator."""
    wanted = request.get_json()
    with Session.begin() as session:
        user = session.get(User, wanted["user"]) or abort(404)
        adapter.set_balance(
            session, user.id, Decimal(wanted["balance"]), actor=wanted["administrator"], reason=wanted["reason"]
        )
        return {"balance": str(adapter.balance(session, user.id).amount)}


@app.get("/export.csv")
def export() -> Any:
    """All balances, for the bookkeeper."""
    with Session() as session:
        users = session.scalars(select(User).order_by(User.id)).all()
        balances = adapter.balances(session, [user.id for user in users])
        lines = [f"{user.id},{user.tenant},{balances[user.id].amount}" for user in users]
    return "\n".join(["user,tenant,balance", *lines, ""]), {"Content-Type": "text/csv"}
