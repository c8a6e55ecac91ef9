"""
Energy per inference from the best sensor a device has, or nothing at all.

Sensors lag: a chip publishes the mean of the last `averaging_s` every `update_s`. So the integration window runs on
for both after the burst, and the idle energy of that extension is taken off again. Integrating over the burst alone
reads 9 to 46 % too low with a slow sensor. Idle power is the median before and after the burst.

A rail is picked because its name says it carries everything. Rails are never added: CPU and GPU are inside the input.
"""

import os
import random
import re
import threading
import time
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np

from . import system, wire

TOTAL = re.compile(r"(POM_5V_IN|VDD_IN|5V_IN|VIN)$")  # rails that feed the whole module; VIN_SYS_5V0 does not
EXTERNAL = re.compile(r"ina2\d\d$")  # ina219, ina226, ina260...; the three-channel ina3221 is a board's own

# Assumed where a driver does not tell; too long only adds noise, too short loses energy.
RAIL_LAG, FUEL_GAUGE_LAG, COUNTER_LAG = 0.1, 1.0, 0.001
FAST, SLOW = 0.01, 0.05  # seconds between samples; 20 Hz is as good as 100 Hz over two seconds
LEAST_RUNS, LEAST_SECONDS, LEAST_SAMPLES = 200, 2.0, 10
IDLE_MOVED = 0.05


class Sensor(NamedTuple):
    """Where power or energy is read, and how late it is."""

    source: str  # external | rail | rapl | fuel_gauge, then what it is called
    kind: str  # power | counter
    groups: Tuple[Tuple[str, ...], ...]  # files; a group is multiplied (volts by amperes), counters have one group each
    scale: float  # of the product, to watts or joules
    averaging_s: float
    update_s: float
    ranges: Tuple[float, ...] = ()  # joules at which each counter starts again
    status: str = ""  # a file that must say Discharging at every sample

    @property
    def lag(self):
        # type: () -> float
        return self.averaging_s + self.update_s


Clock = Callable[[], float]
Sleep = Callable[[float], None]
Measured = Tuple[Optional[wire.Energy], Tuple[str, ...]]  # and the flags
Samples = List[Tuple[float, Optional[Tuple[float, ...]]]]
Search = Tuple[Optional[Sensor], str]


def find(root="/"):
    # type: (str) -> Optional[Sensor]
    """The first that answers: external meter, Jetson's input rail, processor counters, battery."""
    return next((sensor for sensor in (search(root)[0] for search in SEARCHES) if sensor), None)


def why_not(root="/"):
    # type: (str) -> str
    """What was looked for and missed, for a report without energy. Empty where `find` has a sensor."""
    found = [search(root) for search in SEARCHES]
    if any(sensor for sensor, _ in found):
        return ""
    return "no power sensor: " + "; ".join(reason for _, reason in found)


def read(sensor):
    # type: (Sensor) -> Optional[Tuple[float, ...]]
    """Watts, or the joules of every counter; None where it does not answer now."""
    if sensor.status and system.text(sensor.status) != "Discharging":
        return None
    values = []
    for group in sensor.groups:
        parts = [system.number(path) for path in group]
        if None in parts:
            return None
        product = sensor.scale
        for part in parts:
            product *= float(part or 0)
        values.append(abs(product) if sensor.status else product)  # gauges disagree on the sign of discharging
    return tuple(values)


def measure(sensor, burst, idle_seconds=2.0, clock=time.perf_counter, sleep=time.sleep):
    # type: (Sensor, Callable[[], int], float, Clock, Sleep) -> Measured
    """
    `burst()` runs inferences back to back and returns how many (`timing.burst`). Latency is measured in another pass:
    sampling disturbs it. No energy, and a flag that says why, where the sensor fell silent.
    """
    samples = []  # type: Samples
    done, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=_sample, args=(sensor, samples, clock, sleep, done, ready), daemon=True)
    thread.start()
    ready.wait()
    try:
        sleep(sensor.lag)  # what ran before this call has left the sensor's average
        idle = clock()
        sleep(idle_seconds)
        start = clock()
        inferences = burst()
        end = clock()
        sleep(sensor.lag + idle_seconds)
    finally:
        done.set()
        sleep(2 * SLOW)  # let the sampler see it
        thread.join()
    return _energy(sensor, samples, (idle, start, end, end + sensor.lag + idle_seconds), inferences)


def _sample(sensor, samples, clock, sleep, done, ready):
    # type: (Sensor, Samples, Clock, Sleep, threading.Event, threading.Event) -> None
    """Jittered, because a fixed rate can lock on to the rhythm of the inferences. Stamped at the middle of the read."""
    jitter = random.Random(0)
    period = SLOW if sensor.kind == "counter" else min(max(sensor.update_s, FAST), SLOW)
    try:
        while not done.is_set():
            started = clock()
            value = read(sensor)
            samples.append(((started + clock()) / 2, value))
            ready.set()
            sleep(period * (0.5 + jitter.random()))
    finally:
        ready.set()


def _energy(sensor, samples, marks, inferences):
    # type: (Sensor, Samples, Tuple[float, ...], int) -> Measured
    idle, start, end, last = marks
    if inferences < 1 or not any(value for _, value in samples):
        return None, ("sensor_lost",)
    t = np.array([at for at, value in samples if value is not None])
    joules = _joules(sensor, t, np.array([value for _, value in samples if value is not None]))
    inside = int(((t >= start) & (t <= end + sensor.lag)).sum())
    if inside < LEAST_SAMPLES or _largest_gap(t, idle, last) > 0.1 * (last - idle):
        return None, ("sensor_gaps",)
    before, after = _watts(t, joules, idle, start), _watts(t, joules, end + sensor.lag, last)
    base = (before + after) / 2
    from_start, to_end = np.interp([start, end + sensor.lag], t, joules)
    total = float(to_end - from_start) - base * sensor.lag
    energy = wire.Energy(
        source=sensor.source,
        method=_method(sensor, before, after),
        total_mj=1e3 * total / inferences,
        above_idle_mj=1e3 * (total - base * (end - start)) / inferences,
        idle_w=base,
        seconds=float(end - start),
        samples=inside,
        inferences=inferences,
    )
    return energy, _doubts(energy, before, after)


def _joules(sensor, t, values):
    # type: (Sensor, np.ndarray[Any, Any], np.ndarray[Any, Any]) -> np.ndarray[Any, Any]
    """Energy since the first sample: counters unwrapped and added over packages, power by the trapezoid rule."""
    if sensor.kind == "counter":
        steps = np.mod(np.diff(values, axis=0), np.array(sensor.ranges)).sum(axis=1)
    else:
        steps = np.diff(t) * (values[1:, 0] + values[:-1, 0]) / 2
    return np.concatenate([[0.0], np.cumsum(steps)])


def _watts(t, joules, start, end):
    # type: (np.ndarray[Any, Any], np.ndarray[Any, Any], float, float) -> float
    """The median over a stretch, so that a passing daemon does not count."""
    inside = (t >= start) & (t <= end)
    if inside.sum() < 3:
        low, high = np.interp([start, end], t, joules)
        return float((high - low) / (end - start)) if end > start else 0.0
    return float(np.median(np.diff(joules[inside]) / np.diff(t[inside])))


def _largest_gap(t, start, end):
    # type: (np.ndarray[Any, Any], float, float) -> float
    edges = np.concatenate([[start], t[(t > start) & (t < end)], [end]])
    return float(np.diff(edges).max())


def _method(sensor, before, after):
    # type: (Sensor, float, float) -> str
    how = "counter difference" if sensor.kind == "counter" else "trapezoid"
    return "{}, window extended by {:.3f} s, idle median {:.3f} W before and {:.3f} W after".format(
        how, sensor.lag, before, after
    )


def _doubts(energy, before, after):
    # type: (wire.Energy, float, float) -> Tuple[str, ...]
    found = {
        "energy_too_short": energy.inferences < LEAST_RUNS or energy.seconds < LEAST_SECONDS,
        "idle_moved": abs(after - before) > IDLE_MOVED * max(abs(before), abs(after)),
        "no_load_seen": energy.above_idle_mj <= 0,
    }
    return tuple(name for name in found if found[name])


def _external(root):
    # type: (str) -> Search
    """An INA2xx in the supply line, by driver name: hwmon numbers change at every boot."""
    chips = [hwmon for hwmon in _hwmons(root) if EXTERNAL.match(system.text(os.path.join(hwmon, "name")) or "")]
    if len(chips) > 1:
        chips = [hwmon for hwmon in chips if TOTAL.match(system.text(os.path.join(hwmon, "label")) or "")]
        if len(chips) != 1:
            return None, "several INA2xx meters and not exactly one labelled VIN"
    for hwmon in chips:
        name = "external: {}".format(system.text(os.path.join(hwmon, "name")))
        sensor = _first(name, _interval(hwmon), _power_or_product(hwmon, "power1_input", "in1_input", "curr1_input"))
        return sensor, _refusal(os.path.join(hwmon, "power1_input"), name)
    return None, "no INA2xx meter"


def _jetson_iio(root):
    # type: (str) -> Search
    """L4T 32: mW, mV and mA per rail, named by rail_name_N."""
    for rail in system.under(root, "sys/bus/i2c/drivers/ina3221x/*/iio*device*/rail_name_[0-9]"):
        folder, channel = os.path.dirname(rail), rail[-1]
        if TOTAL.match(system.text(rail) or ""):
            names = [part.format(channel) for part in ("in_power{}_input", "in_voltage{}_input", "in_current{}_input")]
            source = "rail: {}".format(system.text(rail))
            files = [((os.path.join(folder, names[0]),), 1e-3), *_product(folder, names[1], names[2])]
            return _first(source, RAIL_LAG, files), _refusal(files[0][0][0], source)
    return None, "no Jetson input rail (IIO)"


def _jetson_hwmon(root):
    # type: (str) -> Search
    """Newer L4T: in1 to in3 are rails; in4 to in6 are shunts and channel 7 is a sum, which would count twice."""
    folders = system.under(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")
    folders += [hwmon for hwmon in _hwmons(root) if system.text(os.path.join(hwmon, "name")) == "ina3221"]
    for folder in folders:
        for channel in "123":
            label = system.text(os.path.join(folder, "in{}_label".format(channel)))
            if label and TOTAL.match(label):
                source = "rail: {}".format(label)
                files = _product(folder, "in{}_input".format(channel), "curr{}_input".format(channel))
                return _first(source, _interval(folder), files), _refusal(files[0][0][0], source)
    return None, "no Jetson input rail (hwmon)"


def _rapl(root):
    # type: (str) -> Search
    """Processor packages. Not their parts, which they contain, and not psys, which contains them."""
    names, groups, ranges = [], [], []
    for domain in system.under(root, "sys/class/powercap/intel-rapl:[0-9]*"):
        name = system.text(os.path.join(domain, "name")) or ""
        full = system.number(os.path.join(domain, "max_energy_range_uj"))
        if name.startswith("package") and full:
            names.append(name)
            groups.append((os.path.join(domain, "energy_uj"),))
            ranges.append(full * 1e-6)
    if not groups:
        return None, "no RAPL"
    source = "rapl: " + "+".join(names)
    sensor = Sensor(source, "counter", tuple(groups), 1e-6, 0.0, COUNTER_LAG, tuple(ranges))
    if read(sensor):
        return sensor, ""
    denied = any(_denied(path) for (path,) in groups)
    return None, "RAPL needs root" if denied else "RAPL does not answer"


def _fuel_gauge(root):
    # type: (str) -> Search
    """The whole device from its battery, which says nothing while a charger feeds it."""
    cells = system.batteries(root)
    if len(cells) != 1:
        return None, "no battery" if not cells else "several batteries"
    source = "fuel_gauge: {}".format(os.path.basename(cells[0]))
    status = os.path.join(cells[0], "status")
    if system.charger(root) or system.text(status) != "Discharging":
        return None, "battery is charging or charger connected"
    files = [*_product(cells[0], "voltage_now", "current_now", 1e-12), ((os.path.join(cells[0], "power_now"),), 1e-6)]
    return _first(source, FUEL_GAUGE_LAG, files, status), _refusal(files[0][0][1], source)


SEARCHES = (_external, _jetson_iio, _jetson_hwmon, _rapl, _fuel_gauge)


def _hwmons(root):
    # type: (str) -> List[str]
    return system.under(root, "sys/class/hwmon/hwmon*")


def _product(folder, volts, amperes, scale=1e-6):
    # type: (str, str, str, float) -> List[Tuple[Tuple[str, ...], float]]
    return [((os.path.join(folder, volts), os.path.join(folder, amperes)), scale)]


def _power_or_product(folder, power, volts, amperes):
    # type: (str, str, str, str) -> List[Tuple[Tuple[str, ...], float]]
    return [((os.path.join(folder, power),), 1e-6), *_product(folder, volts, amperes)]


def _interval(folder):
    # type: (str) -> float
    """Seconds the chip averages over, as its driver tells."""
    told = system.number(os.path.join(folder, "update_interval"))
    return told / 1000.0 if told and told > 0 else RAIL_LAG


def _first(source, lag, candidates, status=""):
    # type: (str, float, List[Tuple[Tuple[str, ...], float]], str) -> Optional[Sensor]
    """The first way of reading this sensor that gives a number."""
    sensors = [Sensor(source, "power", (files,), scale, lag, lag, (), status) for files, scale in candidates]
    return next((sensor for sensor in sensors if read(sensor)), None)


def _refusal(path, name):
    # type: (str, str) -> str
    return "{} {}".format(name, "may not be read by this user" if _denied(path) else "does not answer")


def _denied(path):
    # type: (str) -> bool
    try:
        with open(path, "rb"):
            return False
    except OSError as error:
        return isinstance(error, PermissionError)
