"""Electricity, CO2 and cost: fake meters, the model, sums over restarts; and where the time goes."""

import itertools
import pathlib
import sys
import types

import pytest

from jaxlm import config
from jaxlm.train import clock as clocks
from jaxlm.train import energy, grid, meters


def powercap(root, zones):
    """A tree as Linux shows it: (folder, name, microjoules)."""
    for folder, name, value in zones:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name), ("energy_uj", value), ("max_energy_range_uj", 1_000_000_000)):
            (root / folder / file).write_text(f"{text}\n")
    return root


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    root = powercap(tmp_path / "powercap", [("intel-rapl:0", "package-0", 5_000_000), ("intel-rapl:0:0", "core", 4_000_000), ("intel-rapl:0:1", "dram", 1_000_000),
                                            ("intel-rapl:1", "psys", 9_000_000), ("intel-rapl:2", "package-1", 999_000_000), ("intel-rapl-mmio:0", "package-0", 7)])
    monkeypatch.setattr(meters, "POWERCAP", root)
    return root


def set_joules(root, **joules):
    for zone, value in joules.items():
        (root / zone.replace("zone", "intel-rapl:").replace("_", ":") / "energy_uj").write_text(f"{int(value * 1e6)}\n")


@pytest.fixture
def hour(monkeypatch):
    """Each look at the clock is an hour after the last; the process works half of one logical CPU."""
    ticks = itertools.count()
    times = types.SimpleNamespace(perf_counter=lambda: next(ticks) * 3600.0, process_time=lambda: 0.0)
    monkeypatch.setattr(energy, "time", times)


def test_packages_and_memory_count_and_counters_wrap(rapl):
    meter = meters.Meter(meters.rapl())
    set_joules(rapl, zone0=8, zone0_0=100, zone0_1=1.5, zone1=900)
    assert meter.joules() == pytest.approx(3.5)
    set_joules(rapl, zone2=4)  # from 999 over 1000 to 4
    assert meter.joules() == pytest.approx(8.5)


def test_a_run_on_measured_cpus(rapl, hour):
    account = energy.Account(config.EnergyConfig(region="fra", price_per_hour=2.0))
    assert account.source == "measured by RAPL (package-0, dram, package-1)"
    set_joules(rapl, zone0=5 + 360)
    row = account.row()
    assert row["energy/kwh"] == row["energy/kwh_low"] == row["energy/kwh_high"] == row["energy/kwh_measured"] == pytest.approx(1e-4)
    assert row["energy/kg_co2"] == pytest.approx(1e-4 * 0.056) and row["energy/dollars"] == pytest.approx(2.0)
    (rapl / "intel-rapl:0" / "energy_uj").unlink()  # the meter goes away: modelled from here on
    row = account.row()
    assert 0 < row["energy/kwh_measured"] < row["energy/kwh_low"] < row["energy/kwh"] < row["energy/kwh_high"]
    said = dict(energy.told(row, config.EnergyConfig(region="FRA", price_per_hour=2.0)))
    assert "of it measured, the rest modelled" in said["energy"] and "56 g/kWh (FRA, Ember 2023)" in said["CO2"] and said["cost"] == "$4.00 (energy.price_per_hour)"


def test_a_meter_that_may_not_be_read_is_one_line_and_a_model(rapl, hour, monkeypatch):
    original = pathlib.Path.read_text

    def refused(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refused)
    account = energy.Account(config.EnergyConfig())
    assert account.source.startswith("modelled from") and "energy_uj may not be read" in account.source and "\n" not in account.source
    row = account.row()
    assert 0 < row["energy/kwh_low"] < row["energy/kwh"] < row["energy/kwh_high"] and row["energy/kwh_measured"] == 0 and "energy/dollars" not in row
    assert "(modelled, " in dict(energy.told(row, config.EnergyConfig()))["energy"]


def test_a_resumed_run_goes_on_from_all_that_was_taken(tmp_path, monkeypatch, hour):
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    account = energy.Account(config.EnergyConfig(watts=100))
    rows = [{"step": 1, "energy/kwh": 1.0, "energy/dollars": 3.0}, {"step": 2, "energy/kwh": 2.0, "energy/kwh_low": 1.5, "energy/dollars": 6.0}, {"step": 2, "eval/loss": 1.0}]
    account.resume(rows)
    row = account.row()
    assert row["energy/kwh"] == pytest.approx(2.1) and row["energy/kwh_low"] == pytest.approx(1.6) and row["energy/dollars"] == pytest.approx(6.0)
    assert "100 W (energy.watts)" in account.source


def test_gpus_count_those_of_this_process(monkeypatch):
    class NVMLError(Exception):
        pass

    counts = {0: 1_000, 3: 50_000, "GPU-b": 7_000}

    def count(handle):
        if handle not in counts:
            raise NVMLError("Not Supported")
        return counts[handle]

    fake = types.SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 4, nvmlDeviceGetHandleByIndex=lambda i: i,
                                 nvmlDeviceGetHandleByUUID=lambda name: name, nvmlDeviceGetTotalEnergyConsumption=count)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b")
    meter = meters.Meter(meters.nvml([0, 1]))
    counts.update({0: 9_000, 3: 51_000, "GPU-b": 7_500})
    assert meter.joules() == pytest.approx(1.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(OSError, match="NVML: Not Supported"):
        meters.nvml([0])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match=r"pip install 'jaxlm\[energy\]'"):
        meters.nvml([0])


@pytest.mark.parametrize("platform, kind, low, high", [("tpu", "TPU v4", 2 * 90, 2 * 192), ("tpu", "TPU v5 lite", 2 * 200 * 90 / 170 * 0.75, 2 * 200 * 192 / 170 * 1.25),
                                                       ("gpu", "NVIDIA H100 80GB HBM3", 140, 1400), ("cpu", "cpu", 1.48, 4), ("gpu", "AMD Instinct", 100, 2000)])
def test_the_model_of_idle_devices_is_a_range(platform, kind, low, high):
    found = energy.power(config.EnergyConfig(), platform, kind, 2)
    assert found.watts(0.0) == pytest.approx((low, high)) and found.watts(0.4)[0] >= low and found.watts(2.0) == found.watts(1.0)


def test_regions():
    assert grid.intensity("world")[0] == 481 and grid.intensity("swe") == (41, "SWE, Ember 2023") and grid.intensity("35") == (35, "energy.region")
    with pytest.raises(ValueError, match="energy.region='Mars' is not known: give a number of grams .* FRA") as wrong:
        energy.Account(config.EnergyConfig(region="Mars"))
    assert "\n" not in str(wrong.value)


def test_time_goes_to_its_parts_and_what_was_lost_is_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    clock = clocks.Clock()

    def passes(seconds):
        now[0] += seconds

    passes(2)
    with clock.spent("compile"):
        passes(5)
    clock.resume([{"step": 4, "time/steps": 10.0, "time/data": 1.0}, {"step": 8, "time/steps": 16.0, "time/data": 2.0, "time/evaluation": 3.0}, {"step": 8}], 4)
    clock.begin()
    for _ in range(2):
        with clock.spent("data"):
            passes(1)
        passes(3)
        clock.finished()
    with clock.spent("evaluation"), clock.spent("checkpoint"):
        passes(7)
    assert clock.step_seconds == 4 and clock.wait_share() == 0.25
    assert clock.row() == {"time/steps": 16, "time/start": 2, "time/compile": 5, "time/data": 3, "time/checkpoint": 7, "time/evaluation": 0, "time/lost": 10,
                           "time/goodput": 16 / 43}
    assert dict(clocks.told(clock.row()))["time"].startswith("43 s: steps 37.2%, start 4.7%") and clocks.told({}) == []
