"""HTTP handlers."""

from shop import models
from shop.routes import schemas
from shop.routes.schemas import Page
from shop.services.payments import pay


def show(session, user_id: int) -> schemas.User:
    user = session.get(models.User, user_id)
    out = schemas.User(id=user.id, total_coins=user.total_coins)  # = read
    out.total_coins = out.total_coins.quantize(2)
    page = Page(total_coins=3)
    page.total_coins = 4
    return {"total_coins": user.total_coins, "promo": out.promo}  # = read


def top_up(session, payload: dict):
    pay(session, payload["user"], payload["total_coins"])  # = false unknown
    client = make_client(promo="x")  # = false unknown


def make_client(**options):
    return options
