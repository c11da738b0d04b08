"""What a server counts, as Prometheus reads it. One thread writes; readers may see one request half counted, which is no matter."""

import bisect
import collections

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper ends of the buckets


class Histogram:
    """Counts of seconds by bucket, and their sum."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """The exposition format of Prometheus."""
        total, lines = 0, [f"# TYPE {name} histogram"]
        for end, count in zip((*map(str, SECONDS), "+Inf"), self.counts):
            total += count
            lines.append(f'{name}_bucket{{le="{end}"}} {total}')
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {total}"]


class Stats:
    """All that a server counts."""

    def __init__(self):
        self.counters: collections.Counter[str] = collections.Counter()
        self.finished: collections.Counter[str] = collections.Counter()  # by why
        self.statuses: collections.Counter[int] = collections.Counter()  # HTTP answers
        self.first, self.between = Histogram(), Histogram()
        self.error = ""  # the last failure of the device

    def count(self, **amounts: int) -> None:
        """Adds to counters by name."""
        self.counters.update(amounts)

    def token(self, seconds: float, first: bool) -> None:
        """A token came so many seconds after its request (the first of an answer) or after the one before."""
        (self.first if first else self.between).add(seconds)

    def ended(self, why: str, drawn: int) -> None:
        """An answer ended: why, and after how many drawn tokens."""
        self.finished[why] += 1
        self.counters["generated_tokens"] += drawn

    def failed(self, error: Exception) -> None:
        """The device failed."""
        self.error = f"{type(error).__name__}: {error}"

    def text(self, load: dict[str, int]) -> str:
        """The exposition format of Prometheus, version 0.0.4."""
        lines = []
        for name, value in sorted(load.items()):
            lines += [f"# TYPE jaxlm_{name} gauge", f"jaxlm_{name} {value}"]
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens"):
            lines += [f"# TYPE jaxlm_{name}_total counter", f"jaxlm_{name}_total {self.counters[name]}"]
        lines += ["# TYPE jaxlm_finished_total counter", *(f'jaxlm_finished_total{{reason="{why}"}} {n}' for why, n in sorted(self.finished.items()))]
        lines += ["# TYPE jaxlm_http_responses_total counter"]
        lines += [f'jaxlm_http_responses_total{{code="{code}"}} {n}' for code, n in sorted(self.statuses.items())]
        lines += self.first.lines("jaxlm_time_to_first_token_seconds") + self.between.lines("jaxlm_inter_token_seconds")
        return "\n".join(lines) + "\n"
