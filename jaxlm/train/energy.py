"""What a run takes in electricity, CO2 and money: measured where a meter can be read, else modelled as a range from the power of the devices and how busy
they were.

Counted are the devices (with NVML and RAPL: and the processors and memory of this machine, with all that runs on it); not the rest of the machine, cooling and
the network: in data centres these add 10 % (Google) to 19 % (Microsoft) by cloudcarbonfootprint.org/docs/methodology, more in older ones.

The model, in watts of one device, low and high, each growing from idle to busy with the utilisation:
* TPU v4: 90 idle, 170 mean, 192 most (docs.cloud.google.com/tpu/docs/v4). Other TPUs: the same shares of the table's watts (chips.py), which are estimates
  there, so a quarter less for low and a quarter more for high. Utilisation is the MFU, which says at least how busy a chip was: high is all the time the most.
* GPUs: a tenth of the data sheet's power idle (estimate), all of it at most. Utilisation as above.
* CPUs, a logical one: 0.74 to 3.5, the means of Amazon's servers (cloudcarbonfootprint.org/docs/methodology), to 2 to 10, a desktop's (estimate).
  Utilisation is the processor time of this process.
* Others: 50 to 1000.
The figure that is shown is the middle of low and high.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxlm import chips
from jaxlm.config import EnergyConfig
from jaxlm.train import grid, meters

_EVERY = 60.0  # seconds between readings, so that no counter wraps twice
_JOULES = 3.6e6  # of a kilowatt hour
TOTALS = ("kwh", "kwh_low", "kwh_high", "kwh_measured", "kg_co2", "dollars")


class Power(NamedTuple):
    """Watts of all devices, idle and busy."""
    low: tuple[float, float]
    high: tuple[float, float]
    says: str  # what it is reckoned from

    def watts(self, use: float) -> tuple[float, float]:
        """At a utilisation from 0 to 1."""
        low, high = (idle + (busy - idle) * min(max(use, 0.0), 1.0) for idle, busy in (self.low, self.high))
        return low, high


def power(cfg: EnergyConfig, platform: str, kind: str, devices: int) -> Power:
    """The model of `devices` devices of a `jax.Device.device_kind`; of CPUs: logical ones."""
    chip = chips.of_kind(kind) if platform != "cpu" else None
    if cfg.watts:
        one, says = ((cfg.watts, cfg.watts), (cfg.watts, cfg.watts)), f"{cfg.watts:g} W (energy.watts)"
        devices = jax.process_count() if platform == "cpu" else devices
    elif chip is not None:
        idle, most = (0.1, 1.0) if chip.platform == "gpu" else (90 / 170, 192 / 170)
        less, more = (0.75, 1.25) if "watts" in chip.assumed else (1.0, 1.0)
        one, says = ((idle * less * chip.watts, less * chip.watts), (most * more * chip.watts,) * 2), f"the power of {chip.name} and the MFU"
    elif platform == "cpu":
        one, says = ((0.74, 3.5), (2.0, 10.0)), f"{devices} logical CPUs and the processor time"
    else:
        one, says = ((50.0, 50.0), (1000.0, 1000.0)), f"50 to 1000 W for {kind}, which is not known: set energy.watts"
    return Power(*(tuple(devices * watts for watts in pair) for pair in one), says)


class Account:
    """Adds up what a run takes. A thread reads the meter now and then; `with` ends it.

    Raises:
      ValueError: one line: a region that is not known.
    """

    def __init__(self, cfg: EnergyConfig):
        self._grams, _ = grid.intensity(cfg.region)
        device = jax.devices()[0]
        self._cpu = device.platform == "cpu"
        alone = jax.process_count() == 1
        self._power = power(cfg, device.platform, device.device_kind, jax.process_count() * (os.cpu_count() or 1) if self._cpu else jax.device_count())
        chip = None if self._cpu else chips.of_kind(device.device_kind)
        count = jax.process_count() if self._cpu else jax.device_count()
        self._price = count * (cfg.price_per_hour or (chip.dollars_per_hour if chip else 0.0))  # an hour
        self._scale = 1.0 if self._cpu else jax.device_count() / jax.local_device_count()  # other hosts' devices draw what ours do
        self._meter, self.source = _meter(cfg, device.platform, alone)
        if self._meter is None:
            self.source = f"modelled from {self._power.says}; {self.source}"
        self._totals = dict.fromkeys(TOTALS, 0.0)
        self._worked = 0.0
        self._time, self._processor, self._joules = time.perf_counter(), time.process_time(), 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Account":
        threading.Thread(target=self._watch, daemon=True, name="energy").start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self._add()

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from the rows of metrics.jsonl of the processes before: work that was lost took its energy too."""
        before = next((row for row in reversed(rows) if "energy/kwh" in row), {})
        for name in TOTALS:
            self._totals[name] += before.get(f"energy/{name}", 0.0)

    def worked(self, seconds: float) -> None:
        """All devices did what takes them so long at their peak."""
        self._worked += seconds

    def _add(self) -> None:
        """What was taken since it was last called."""
        with self._lock:
            now, processor, worked = time.perf_counter(), time.process_time(), self._worked
            seconds = max(now - self._time, 1e-9)
            use = (processor - self._processor) / seconds / (os.cpu_count() or 1) if self._cpu else worked / seconds
            self._time, self._processor, self._worked = now, processor, self._worked - worked
            low, high = (watts * seconds for watts in self._power.watts(use))
            if (measured := self._measured()) is not None:
                low = high = measured
                self._totals["kwh_measured"] += measured / _JOULES
            kwh = (low + high) / 2 / _JOULES
            for name, value in (("kwh", kwh), ("kwh_low", low / _JOULES), ("kwh_high", high / _JOULES), ("kg_co2", kwh * self._grams / 1e3),
                                ("dollars", self._price * seconds / 3600)):
                self._totals[name] += value

    def _measured(self) -> float | None:
        """Joules since the last reading; None without a meter, or when it can no longer be read: modelled from then on."""
        if self._meter is None:
            return None
        try:
            before, self._joules = self._joules, self._meter.joules() * self._scale
        except (OSError, ValueError):
            self._meter = None
            return None
        return self._joules - before

    def row(self) -> dict[str, float]:
        """`energy/NAME` for each of TOTALS since the run's beginning; without dollars where no price is known."""
        self._add()
        return {f"energy/{name}": value for name, value in self._totals.items() if name != "dollars" or value}


def _meter(cfg: EnergyConfig, platform: str, alone: bool) -> tuple[meters.Meter | None, str]:
    """A meter that counts the devices and, where it can be read, their machine; or None and why."""
    if cfg.watts:
        return None, "no meter is asked"
    try:
        if platform == "tpu":
            return None, "TPUs have no meter that users can read"
        if platform != "cpu":
            counters, names = meters.nvml([device.local_hardware_id for device in jax.local_devices()]), "NVML"
            try:
                counters, names = counters + (meters.rapl() if alone else []), "NVML and RAPL" if alone else "NVML"
            except OSError:
                pass
        elif not alone:
            return None, "of several processes no meter is read, as they may share a machine"
        else:
            counters, names = meters.rapl(), "RAPL"
        return meters.Meter(counters), f"measured by {names} ({', '.join(counter.name for counter in counters)})"
    except (OSError, ValueError) as error:
        return None, str(error)


def told(row: Mapping[str, float], cfg: EnergyConfig) -> list[tuple[str, str]]:
    """Of a row with `energy/NAME`: what and how much, as people read it; [] for a row without."""
    if "energy/kwh" not in row:
        return []
    kwh, low, high, measured, kg = (row.get(f"energy/{name}", 0.0) for name in TOTALS[:5])
    share = measured / kwh if kwh else 0.0
    unit, scale = ("kWh", 1.0) if kwh >= 0.1 else ("Wh", 1e3)
    part = f"{share:.0%} of it measured, the rest " if share > 0.001 else ""
    how = "measured" if share > 0.999 else f"{part}modelled, {low * scale:.3g} to {high * scale:.3g}"
    grams, source = grid.intensity(cfg.region)
    mass = f"{kg:.3g} kg" if kg >= 1 else f"{kg * 1e3:.3g} g"
    price = "energy.price_per_hour" if cfg.price_per_hour else "list price"
    dollars = row.get("energy/dollars", 0.0)
    return [("energy", f"{kwh * scale:.3g} {unit} ({how})"), ("CO2", f"{mass} at {grams:g} g/kWh ({source})"),
            *([("cost", f"${dollars:.2f} ({price})" if dollars >= 0.1 else f"${dollars:.2g} ({price})")] if dollars else [])]
