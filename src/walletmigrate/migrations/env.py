"""Runs the ledger's migrations on the connection that `walletmigrate.schema.migrate` hands over."""

from alembic import context

from walletmigrate.schema import VERSION_TABLE

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table=VERSION_TABLE,
    version_table_schema=attributes["schema"],
)
context.run_migrations()
