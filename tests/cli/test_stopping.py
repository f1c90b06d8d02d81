"""The stop signals by themselves; what they do to a run is in test_run_ray."""

from __future__ import annotations

import signal

import pytest

from b2batch.cli.stopping import StopSignals


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_asks_and_says_so(first: signal.Signals) -> None:
    said: list[str] = []

    with StopSignals(said.append) as stop:
        assert not stop.is_asked()
        signal.raise_signal(first)

        assert stop.is_asked()
    assert len(said) == 1
    assert f"{first.name}: stopping" in said[0]


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_the_second_signal_ends_with_its_code(second: signal.Signals, code: int) -> None:
    def run() -> None:
        with StopSignals(lambda text: None) as stop:
            signal.raise_signal(signal.SIGINT)
            try:
                signal.raise_signal(second)
            except SystemExit:
                assert stop.forced_code() == code
                raise SystemExit(1) from None  # as Ray does

    with pytest.raises(SystemExit) as ended:
        run()

    assert ended.value.code == code


def test_the_handlers_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with StopSignals(lambda text: None):
        pass

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
