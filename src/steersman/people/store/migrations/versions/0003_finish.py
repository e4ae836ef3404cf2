"""Why the answers of an item ended."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("answer", sa.Column("finish", sa.String(length=20), nullable=True))
