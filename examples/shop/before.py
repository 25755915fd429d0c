"""A booking shop as it was before: one balance for each user, changed in place."""

from __future__ import annotations

import os
from decimal import Decimal
from typing import Any

from flask import Flask, abort, request
from models import Booking, User
from sqlalchemy import create_engine, select
from sqlalchemy.orm import sessionmaker

app = Flask(__name__)
engine = create_engine(os.environ["SHOP_DATABASE_URL"])
Session = sessionmaker(engine)


@app.post("/users")
def join() -> Any:
    """A new user, who begins with nothing."""
    with Session.begin() as session:
        user = User(tenant=request.get_json()["tenant"])
        session.add(user)
        session.flush()
        return {"user": user.id}, 201


@app.get("/users/<int:user_id>/balance")
def balance(user_id: int) -> Any:
    """What the user has."""
    with Session() as session:
        user = session.get(User, user_id) or abort(404)
        return {"balance": str(user.balance)}


@app.post("/bookings")
def book() -> Any:
    """Pay for a place from the balance."""
    wanted = request.get_json()
    price = Decimal(wanted["price"])
    with Session.begin() as session:
        user = session.get(User, wanted["user"], with_for_update=True) or abort(404)
        if user.balance < price:
            abort(409)
        booking = Booking(user_id=user.id, price=price)
        session.add(booking)
        session.flush()
        user.balance -= price
        return {"booking": booking.id}, 201


@app.post("/bookings/<int:booking_id>/refund")
def refund(booking_id: int) -> Any:
    """Give the money back, once."""
    with Session.begin() as session:
        booking = session.get(Booking, booking_id, with_for_update=True) or abort(404)
        if booking.state == "refunded":
            abort(409)
        booking.state = "refunded"
        user = session.get(User, booking.user_id, with_for_update=True) or abort(404)
        user.balance += booking.price
        return {"booking": booking.id, "state": booking.state}


@app.post("/admin/balance")
def adjust() -> Any:
    """Put a balance right, as an administrator."""
    wanted = request.get_json()
    with Session.begin() as session:
        user = session.get(User, wanted["user"], with_for_update=True) or abort(404)
        user.balance = Decimal(wanted["balance"])
        return {"balance": str(user.balance)}


@app.get("/export.csv")
def export() -> Any:
    """All balances, for the bookkeeper."""
    with Session() as session:
        users = session.scalars(select(User).order_by(User.id)).all()
        lines = [f"{user.id},{user.tenant},{user.balance}" for user in users]
    return "\n".join(["user,tenant,balance", *lines, ""]), {"Content-Type": "text/csv"}
