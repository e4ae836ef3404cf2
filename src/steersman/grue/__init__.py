"""Tasks x methods x seeds: what each method makes of seven kinds of text, in one table with intervals."""

from steersman.grue.task import Hub, Row, Task, in_split

__all__ = ["Hub", "Row", "Task", "in_split"]
