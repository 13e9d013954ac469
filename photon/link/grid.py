"""What Photon's grids have in common: Flower's ServerApp pushes messages to a grid, and pulls the replies."""

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class PhotonGrid(Grid):
    """A grid of Photon's own."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (deprecated in Flower in favour of its constructor)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class GridInFront(PhotonGrid):
    """A grid that sends its messages through another one, in a way of its own.

    Parameters
    ----------
    grid
        The other one, which has the run and the nodes.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return self._grid.get_node_ids()
