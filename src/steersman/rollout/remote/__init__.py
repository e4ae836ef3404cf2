"""Generation in other processes: servers, and weights that travel to them with a receipt."""

from steersman.rollout.remote.generator import RemoteGenerator
from steersman.rollout.remote.servers import ServerSettings, open_process, open_vllm
from steersman.rollout.remote.snapshot import Receipt, ReceiptError, Snapshot

__all__ = ["Receipt", "ReceiptError", "RemoteGenerator", "ServerSettings", "Snapshot", "open_process", "open_vllm"]
