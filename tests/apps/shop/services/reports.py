"""Repositories, awaits, unpacking."""

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased, load_only

from shop.models import Campaign, Order, User


class UserRepo:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def one(self, user_id: int) -> "User | None":
        return await self.session.get(User, user_id)

    async def total(self):
        return await self.session.scalar(select(func.sum(User.total_coins)))  # = read

    async def both(self):
        found = await self.session.execute(select(User, Order).options(load_only(User.total_coins)))  # = read
        for user, order in found:
            print(user.total_coins, order.total_coins)  # = read
        rows = (await self.session.execute(select(User.id, User.total_coins))).all()  # = read
        return {row.id: row.total_coins for row in rows}  # = read


async def report(repo: UserRepo, campaign: Campaign):
    user = await repo.one(1)
    print(user.total_coins, campaign.promo)  # = read
    other = aliased(User)
    return select(other.total_coins).join(Order).where(Order.total_coins > other.total_coins)  # = read


def totals(orders: list[Order], campaigns: dict[str, Campaign]):
    for key, each in campaigns.items():
        print(each.promo)
    return sum(one.total_coins for one in orders)


def ad(request, campaign_repo):
    found = campaign_repo.find(request.args["promo"])  # = false unknown
    basket = request.basket
    basket.total_coins = 0  # = false write
    return found.promo  # = false read
