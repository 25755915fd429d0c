"""Alembic: coins, and a repair of data."""

import sqlalchemy as sa
from alembic import op


def upgrade():
    op.add_column("users", sa.Column("total_coins", sa.Numeric()))  # = definition
    op.add_column("orders", sa.Column("total_coins", sa.Numeric()))
    op.create_index("ix_coins", "users", ["total_coins"])  # = definition
    op.create_index("ix_coins_o", "orders", ["total_coins"])
    with op.batch_alter_table("users") as batch_op:
        batch_op.alter_column("total_coins", nullable=False)  # = definition
    op.execute("update users set total_coins = 0 where total_coins is null")  # = write read


def downgrade():
    op.drop_column("users", "total_coins")  # = definition
