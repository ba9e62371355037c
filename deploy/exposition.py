"""What a running server says of itself at `/metrics`."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from deploy.reply import reply


class Exposition:
    """One reading of every series.

    Args:
        text: in the Prometheus text format.
    """

    def __init__(self, text: str) -> None:
        self._series = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def total(self, name: str) -> float:
        """The sum of all series of a name.

        Raises:
            ValueError: there is none.
        """
        found = [value for (series, _), value in self._series.items() if series == name]
        if not found:
            raise ValueError(f"the server does not export {name}")
        return sum(found)

    def value(self, name: str, **labels: str) -> float:
        """One series.

        Raises:
            ValueError: there is none.
        """
        series = name, frozenset(labels.items())
        if series not in self._series:
            raise ValueError(f"the server does not export {name} with {labels}")
        return self._series[series]


def scrape(url: str, timeout: float = 10.0) -> Exposition:
    """Read a server's metrics now.

    Args:
        url: `http://host:port`.
        timeout: in seconds.

    Raises:
        ConnectionError: it is gone, or gives something else.
    """
    try:
        return Exposition(reply(f"{url}/metrics", timeout=timeout).decode())
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{url} gives no metrics: {error}") from None
