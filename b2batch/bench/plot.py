"""A comparison as a self-contained HTML page of bars."""

from __future__ import annotations

from pathlib import Path

from b2batch.bench.record import Comparison, Spread
from b2batch.errors import CallerError


def require_plotly() -> None:
    """Raise CallerError unless plots can be made; called before anything is measured."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise CallerError("--plot needs plotly: pip install 'b2batch[bench]'") from None


def write_plot(found: Comparison, title: str, path: Path) -> None:
    """Rows a second and rows a CPU second of every peer that ran, with their spreads."""
    import plotly.graph_objects as go

    peers = [peer for peer in found.peers if peer.rounds]
    names = [peer.name for peer in peers]
    figure = go.Figure(
        [
            _bars("rows a second", names, [peer.rows_per_s for peer in peers]),
            _bars("rows a CPU second", names, [peer.rows_per_cpu_s for peer in peers]),
        ]
    )
    figure.update_layout(title=title, barmode="group", yaxis_title="rows / s", template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)


def _bars(name: str, peers: list[str], spreads: list[Spread]) -> object:
    import plotly.graph_objects as go

    error = {
        "array": [spread.high - spread.median for spread in spreads],
        "arrayminus": [spread.median - spread.low for spread in spreads],
    }
    return go.Bar(name=name, x=peers, y=[spread.median for spread in spreads], error_y=error)
