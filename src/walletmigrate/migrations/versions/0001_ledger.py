"""The ledger: accounts, transactions, keys, jobs, audit."""

from alembic import context, op

from walletmigrate.schema import quoted, render, run_script

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables, types and views of the ledger."""
    run_script(op.get_bind(), render("ledger", schema=quoted(context.config.attributes["schema"])))
