"""What goes through the adapter already."""

from walletmigrate import AsyncLegacyBalanceAdapter, LegacyBalanceAdapter

from shop.models import User

wallet = LegacyBalanceAdapter.from_config()


class Till:
    def __init__(self, adapter: AsyncLegacyBalanceAdapter) -> None:
        self.adapter = adapter

    async def pay(self, session, user_id):
        await self.adapter.credit(session, user_id, 10, type="topup")  # = adapter


def pay(session, user: User):
    wallet.debit(session, user.id, user.total_coins, type="all")  # = adapter read
    wallet.transfer(session, 1, 2, 3, type="gift")  # = adapter
    return wallet.balance(session, user.id)  # = adapter


def settled(session, user: User):
    user.total_coins = 0  # walletmigrate: ignore closed accounts hold nothing  # = accepted
    # walletmigrate: ignore the import runs before the ledger opens
    session.execute(
        "update users set total_coins = 1",  # = accepted
    )
    user.total_coins = 1  # walletmigrate: ignore
    # ^ = write
