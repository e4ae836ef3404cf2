"""Conversations, queues of items and append-only judgements, in SQLite or PostgreSQL."""

from steersman.people.store.database import Store, open_store

__all__ = ["Store", "open_store"]
