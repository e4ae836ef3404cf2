"""Run by alembic: the connection comes from `database.open_store`."""

from alembic import context

from steersman.people.store.schema import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
