"""
The energy method against synthetic boards on simulated time: no test sleeps or asserts a real duration.

A simulated board publishes the mean of its last `averaging` seconds every `update` seconds, as an INA chip behind a
driver does, into the very file the agent reads. Time moves only when the agent and its sampling thread both sleep.
"""

import builtins
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeformer_agent import power, wire

BOARDS = Path(__file__).parent / "sysfs"
IDLE, BUSY = 2.7, 5.4
JETSON = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
RAPL = "sys/class/powercap/intel-rapl:0"
BATTERY = "sys/class/power_supply/BAT0"


class Simulation:
    """Time for several threads: it moves to the next waking only when every thread that asked for it sleeps."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self.now, self.tick = 0.0, tick
        self.moved = threading.Condition()
        self.wakes: dict[threading.Thread, float] = {}

    def clock(self) -> float:
        with self.moved:
            self.wakes.setdefault(threading.current_thread(), self.now)
            return self.now

    def sleep(self, seconds: float) -> None:
        me = threading.current_thread()
        with self.moved:
            wake = self.wakes[me] = self.now + seconds
            while self.now < wake:
                self.wakes = {thread: at for thread, at in self.wakes.items() if thread.is_alive()}
                if min(self.wakes.values()) > self.now:  # nobody is awake
                    self.now = min(self.wakes.values())
                    self.tick(self.now)
                    self.moved.notify_all()
                else:
                    self.moved.wait(0.002)  # real time, in case a sampler ended without a word


class Board:
    """Power over time, and the file of its sensor."""

    def __init__(self, path: Path, averaging: float, update: float, unit: float = 1e-3) -> None:
        self.path, self.averaging, self.update, self.unit = path, averaging, update, unit
        self.levels = [(-1e3, IDLE)]  # since when, watts
        self.published = -1.0
        self.time = Simulation(self.tick)
        self.write(0.0)

    def set(self, watts: float) -> None:
        self.levels.append((self.time.now, watts))

    def joules(self, until: float) -> float:
        ends = [at for at, _ in self.levels[1:]] + [float("inf")]
        spans = zip(self.levels, ends, strict=True)
        return sum(watts * max(0.0, min(end, until) - start) for (start, watts), end in spans)

    def tick(self, now: float) -> None:
        if now >= self.published + self.update:
            self.write(now)

    def write(self, now: float) -> None:
        self.published = now - now % self.update
        start = self.published - self.averaging
        watts = (self.joules(self.published) - self.joules(start)) / self.averaging
        self.path.write_text(f"{watts / self.unit:.0f}\n")

    def burst(self, runs: int, seconds: float) -> Callable[[], int]:
        def body() -> int:
            self.set(BUSY)
            for _ in range(runs):
                self.time.sleep(seconds)
            self.set(IDLE)
            return runs

        return body

    def measure(self, sensor: power.Sensor, burst: Callable[[], int]) -> tuple[wire.Energy | None, tuple[str, ...]]:
        return power.measure(sensor, burst, 2.0, self.time.clock, self.time.sleep)


def sensor_at(path: Path, averaging: float, update: float) -> power.Sensor:
    return power.Sensor("rail: TEST", "power", ((str(path),),), 1e-3, averaging, update)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(BOARDS / name, tmp_path / name))

    return make


def put(root: Path, name: str, content: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{content}\n")


def meter(root: Path, hwmon: str = "hwmon7", name: str = "ina226", **files: Any) -> None:
    """An external INA2xx as its kernel driver shows it."""
    shown = {"name": name, "power1_input": 3150000, "in1_input": 5080, "curr1_input": 620, "update_interval": 35}
    for file, content in {**shown, **files}.items():
        if content is not None:
            put(root, f"sys/class/hwmon/{hwmon}/{file}", content)


def naive(sensor: power.Sensor) -> power.Sensor:
    """Integrate over the burst alone."""
    return sensor._replace(averaging_s=0.0, update_s=0.0)


class Counters(Board):
    """Packages that count microjoules and start again at `ranges`; each takes an equal share."""

    def __init__(self, root: Path, starts: dict[str, int], full: int) -> None:
        self.files = {root / "sys/class/powercap" / name / "energy_uj": start for name, start in starts.items()}
        self.full = full
        super().__init__(root, 0.0, 0.001)

    def write(self, now: float) -> None:
        spent = 1e6 * (self.joules(now) - self.joules(0.0)) / len(self.files)
        for path, start in self.files.items():
            path.write_text(f"{(start + spent) % self.full:.0f}")


# --- the method


@pytest.mark.parametrize(("averaging", "update"), [(0.1, 0.05), (0.5, 0.25), (0.0047, 0.0047), (1.0, 1.0)])
def test_extended_window_is_right_where_the_plain_one_is_low(tmp_path: Path, averaging: float, update: float) -> None:
    def error(choose: Callable[[power.Sensor], power.Sensor]) -> float:
        board = Board(tmp_path / "power", averaging, update)
        energy, _ = board.measure(choose(sensor_at(board.path, averaging, update)), board.burst(200, 0.0125))
        assert energy and energy.inferences == 200
        return energy.total_mj / (1e3 * BUSY * 0.0125) - 1

    extended, plain = error(lambda sensor: sensor), error(naive)
    assert abs(extended) < 0.03
    if averaging + update > 0.01:
        assert plain < min(-abs(extended), -0.01)
    if averaging + update >= 0.75:
        assert plain < -0.05


def test_the_record_says_what_was_measured(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.1, 0.05)
    energy, flags = board.measure(sensor_at(board.path, 0.1, 0.05), board.burst(200, 0.0125))
    assert energy and flags == ()
    assert energy.source == "rail: TEST"
    assert energy.method == "trapezoid, window extended by 0.150 s, idle median 2.700 W before and 2.700 W after"
    assert energy.seconds == pytest.approx(2.5)
    assert energy.idle_w == pytest.approx(IDLE, abs=1e-3)
    assert energy.above_idle_mj == pytest.approx((BUSY - IDLE) * 12.5, rel=0.03)
    assert energy.total_mj - energy.above_idle_mj == pytest.approx(energy.idle_w * 12.5)
    assert 2.65 / 0.075 < energy.samples < 2.65 / 0.025  # 20 Hz on average
    assert all(type(value) in (str, float, int) for value in energy)


def test_load_from_before_the_call_is_not_taken_for_idle(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 1.9, 0.1)
    board.levels = [(-1e3, BUSY), (0.0, IDLE)]  # the latency pass ended this very moment
    energy, flags = board.measure(sensor_at(board.path, 1.9, 0.1), board.burst(200, 0.0125))
    assert energy and energy.idle_w == pytest.approx(IDLE, rel=0.01)
    assert flags == ()


def test_idle_is_taken_on_both_sides(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.1, 0.05)
    body = board.burst(200, 0.0125)

    def warm() -> int:
        runs = body()
        board.set(1.04 * IDLE)  # the chip leaks more
        return runs

    energy, flags = board.measure(sensor_at(board.path, 0.1, 0.05), warm)
    assert energy and energy.idle_w == pytest.approx(1.02 * IDLE, rel=0.002)
    assert "idle median 2.700 W before and 2.808 W after" in energy.method
    assert flags == ()


def test_sampling_does_not_lock_on_to_the_inferences(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.002, 0.002)

    def bursts() -> int:
        for _ in range(300):  # each starts hungry and ends idle, in step with a 10 ms sampler
            board.set(8.1)
            board.time.sleep(0.005)
            board.set(IDLE)
            board.time.sleep(0.005)
        return 300

    energy, _ = board.measure(sensor_at(board.path, 0.002, 0.002), bursts)
    assert energy and energy.total_mj == pytest.approx(1e3 * 5.4 * 0.01, rel=0.08)


def test_a_daemon_in_the_idle_time_does_not_count(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.05, 0.05)
    body = board.burst(200, 0.0125)
    board.levels += [(0.5, 9.0), (0.8, IDLE)]
    energy, flags = board.measure(sensor_at(board.path, 0.05, 0.05), body)
    assert energy and energy.idle_w == pytest.approx(IDLE, rel=0.01) and flags == ()


def test_short_unsteady_and_unloaded_bursts_are_flagged(tmp_path: Path) -> None:
    def flags(runs: int, seconds: float, busy: float, after: float) -> tuple[str, ...]:
        board = Board(tmp_path / "power", 0.05, 0.05)

        def burst() -> int:
            board.set(busy)
            board.time.sleep(seconds)
            board.set(after)
            return runs

        energy, found = board.measure(sensor_at(board.path, 0.05, 0.05), burst)
        assert energy
        return found

    assert flags(200, 2.125, BUSY, IDLE) == ()
    assert flags(199, 2.0, BUSY, IDLE) == ("energy_too_short",)
    assert flags(200, 1.9, BUSY, IDLE) == ("energy_too_short",)
    assert flags(200, 2.125, BUSY, 1.1 * IDLE) == ("idle_moved",)
    assert flags(200, 2.125, BUSY, 1.03 * IDLE) == ()
    assert flags(200, 2.125, 0.9 * IDLE, IDLE) == ("no_load_seen",)


def test_a_sensor_that_falls_silent_gives_no_energy(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.05, 0.05)
    dead = sensor_at(tmp_path / "nowhere", 0.05, 0.05)
    assert board.measure(dead, board.burst(200, 0.0125)) == (None, ("sensor_lost",))

    def silent(seconds: float) -> tuple[wire.Energy | None, tuple[str, ...]]:
        board = Board(tmp_path / "power", 0.05, 0.05)
        body = board.burst(200, 0.0125)
        start = 0.1 + 2.0 + 0.5
        plain = board.write

        def write(now: float) -> None:
            plain(now)
            if start <= now < start + seconds:
                board.path.write_text("garbage")

        board.write = write  # type: ignore[method-assign]
        return board.measure(sensor_at(board.path, 0.05, 0.05), body)

    assert silent(1.5) == (None, ("sensor_gaps",))
    energy, flags = silent(0.2)
    assert energy and flags == () and energy.total_mj == pytest.approx(67.5, rel=0.03)


def test_nothing_run_is_nothing_measured(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.05, 0.05)
    assert board.measure(sensor_at(board.path, 0.05, 0.05), lambda: 0)[0] is None


def test_a_failing_program_stops_the_sampler(tmp_path: Path) -> None:
    board = Board(tmp_path / "power", 0.05, 0.05)
    before = threading.active_count()

    def broken() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        board.measure(sensor_at(board.path, 0.05, 0.05), broken)
    assert threading.active_count() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sampler_that_dies_does_not_hang_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "power", 0.05, 0.05)
    monkeypatch.setattr(power, "read", lambda _: 1 / 0)
    assert board.measure(sensor_at(board.path, 0.05, 0.05), board.burst(200, 0.0125)) == (None, ("sensor_lost",))


# --- counters


@pytest.mark.parametrize("start", [5_000_000, 262_143_328_850 - 8_000_000])  # the second starts again in mid-burst
def test_rapl_counter_and_its_wraparound(copy: Callable[[str], Path], start: int) -> None:
    root = copy("laptop")
    board = Counters(root, {"intel-rapl:0": start}, 262_143_328_850)
    sensor = power.find(root)
    assert sensor and sensor.source == "rapl: package-0" and sensor.kind == "counter"
    assert sensor.ranges == pytest.approx((262143.32885,))
    energy, flags = board.measure(sensor, board.burst(200, 0.0125))
    assert energy and flags == ()
    assert energy.method.startswith("counter difference")
    assert energy.total_mj == pytest.approx(67.5, rel=0.01)
    assert energy.above_idle_mj == pytest.approx(33.75, rel=0.02)
    assert energy.idle_w == pytest.approx(IDLE, rel=0.01)


def test_rapl_adds_packages_and_nothing_inside_or_around_them(copy: Callable[[str], Path]) -> None:
    root = copy("laptop")
    full = 262_143_328_850
    put(root, "sys/class/powercap/intel-rapl:2/name", "package-1")
    put(root, "sys/class/powercap/intel-rapl:2/max_energy_range_uj", full)
    board = Counters(root, {"intel-rapl:0": 0, "intel-rapl:2": full - 4_000_000}, full)  # one of them wraps
    sensor = power.find(root)
    assert sensor and sensor.source == "rapl: package-0+package-1"
    energy, _ = board.measure(sensor, board.burst(200, 0.0125))
    assert energy and energy.total_mj == pytest.approx(67.5, rel=0.01)


def test_rapl_without_a_range_or_an_answer_is_no_sensor(copy: Callable[[str], Path]) -> None:
    root = copy("laptop")
    put(root, f"{BATTERY}/status", "Charging")
    put(root, f"{RAPL}/energy_uj", "")
    assert power.find(root) is None
    assert "RAPL does not answer" in power.why_not(root)
    put(root, f"{RAPL}/energy_uj", 5)
    assert power.find(root)
    (root / RAPL / "max_energy_range_uj").unlink()
    assert power.find(root) is None
    assert "no RAPL" in power.why_not(root)


# --- which sensor


def test_a_board_without_a_sensor_has_no_energy_and_a_reason() -> None:
    for name in ("raspberry-pi-4", "container"):
        assert power.find(BOARDS / name) is None
        reason = power.why_not(BOARDS / name)
        assert reason.startswith("no power sensor: ")
        for missed in ("INA2xx", "Jetson", "RAPL", "battery"):
            assert missed in reason


def test_the_jetson_rail_is_the_input_and_never_a_sum(copy: Callable[[str], Path]) -> None:
    root = copy("jetson-nano")
    sensor = power.find(root)
    assert sensor and sensor.source == "rail: POM_5V_IN" and power.why_not(root) == ""
    assert power.read(sensor) == (pytest.approx(2.710),)  # 3.560 with the GPU and CPU rails
    put(root, f"{JETSON}/rail_name_0", "POM_5V_CPU")
    put(root, f"{JETSON}/rail_name_2", "VDD_IN")
    sensor = power.find(root)
    assert sensor and power.read(sensor) == (pytest.approx(0.640),)  # the name decides, not the channel
    put(root, f"{JETSON}/rail_name_2", "VIN_SYS_5V0")  # an AGX part rail
    assert power.find(root) is None


def test_the_jetson_rail_from_volts_and_amperes(copy: Callable[[str], Path]) -> None:
    root = copy("jetson-nano")
    (root / JETSON / "in_power0_input").unlink()
    sensor = power.find(root)
    assert sensor and power.read(sensor) == (pytest.approx(5.010 * 0.541),)
    put(root, f"{JETSON}/in_current0_input", "garbage")
    assert power.read(sensor) is None
    assert power.find(root) is None
    assert "rail: POM_5V_IN does not answer" in power.why_not(root)


@pytest.mark.parametrize("folder", ["sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3", "sys/class/hwmon/hwmon3"])
def test_the_newer_jetson_layout(tmp_path: Path, folder: str) -> None:
    rails = {1: ("VDD_CPU_GPU_CV", 5000, 900), 2: ("VDD_IN", 5048, 1200), 3: ("VDD_SOC", 5000, 300)}
    for channel, (label, millivolts, milliamperes) in rails.items():
        put(tmp_path, f"{folder}/in{channel}_label", label)
        put(tmp_path, f"{folder}/in{channel}_input", millivolts)
        put(tmp_path, f"{folder}/curr{channel}_input", milliamperes)
    put(tmp_path, f"{folder}/in7_label", "VIN")  # the sum of shunts is no rail
    put(tmp_path, f"{folder}/name", "ina3221")
    sensor = power.find(tmp_path)
    assert sensor and sensor.source == "rail: VDD_IN"
    assert power.read(sensor) == (pytest.approx(5.048 * 1.2),)
    assert sensor.lag == 0.2  # not told, assumed
    put(tmp_path, f"{folder}/update_interval", 18)
    again = power.find(tmp_path)
    assert again and again.averaging_s == again.update_s == 0.018


def test_an_external_meter_comes_first_and_is_known_by_name(copy: Callable[[str], Path]) -> None:
    root = copy("jetson-nano")
    meter(root)
    sensor = power.find(root)
    assert sensor and sensor.source == "external: ina226"
    assert power.read(sensor) == (pytest.approx(3.15),)
    assert (sensor.averaging_s, sensor.update_s) == (0.035, 0.035)
    put(root, "sys/class/hwmon/hwmon7/power1_input", "N/A")
    sensor = power.find(root)
    assert sensor and power.read(sensor) == (pytest.approx(5.08 * 0.62),)
    put(root, "sys/class/hwmon/hwmon7/name", "ina226x")
    sensor = power.find(root)
    assert sensor and sensor.source == "rail: POM_5V_IN"


@pytest.mark.parametrize("interval", [None, "garbage", 0, -5])
def test_a_meter_that_does_not_tell_its_interval(tmp_path: Path, interval: Any) -> None:
    meter(tmp_path, name="ina219", update_interval=interval)
    sensor = power.find(tmp_path)
    assert sensor and sensor.lag == 0.2


def test_of_several_meters_only_a_labelled_one_is_trusted(copy: Callable[[str], Path]) -> None:
    root = copy("raspberry-pi-4")
    meter(root, "hwmon7")
    meter(root, "hwmon8", power1_input=900000)
    assert power.find(root) is None
    assert "several INA2xx" in power.why_not(root)
    put(root, "sys/class/hwmon/hwmon8/label", "VIN")
    sensor = power.find(root)
    assert sensor and power.read(sensor) == (pytest.approx(0.9),)
    put(root, "sys/class/hwmon/hwmon7/label", "VIN")
    assert power.find(root) is None


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Tests may run as root, whom no mode bits stop."""
    plain = builtins.open

    def forbid(name: str) -> None:
        def guarded(file: Any, *arguments: Any, **named: Any) -> Any:
            if str(file).endswith(name):
                raise PermissionError(13, "Permission denied", str(file))
            return plain(file, *arguments, **named)

        monkeypatch.setattr(builtins, "open", guarded)

    return forbid


def test_forbidden_counters_are_absent_and_say_why(copy: Callable[[str], Path], denied: Callable[[str], None]) -> None:
    root = copy("laptop")
    denied("energy_uj")
    sensor = power.find(root)
    assert sensor and sensor.source == "fuel_gauge: BAT0"  # the next best
    assert power.why_not(root) == ""
    put(root, f"{BATTERY}/status", "Full")
    assert power.find(root) is None
    assert "RAPL needs root" in power.why_not(root)


def test_a_forbidden_rail_is_absent_and_says_why(copy: Callable[[str], Path], denied: Callable[[str], None]) -> None:
    root = copy("jetson-nano")
    denied("_input")
    assert power.find(root) is None
    assert "rail: POM_5V_IN may not be read by this user" in power.why_not(root)


# --- batteries


@pytest.fixture
def unplugged(copy: Callable[[str], Path]) -> Path:
    root = copy("laptop")
    shutil.rmtree(root / "sys/class/powercap")
    return root


@pytest.mark.parametrize("current", [-500000, 500000])  # three conventions of the sign are in the field
def test_a_battery_counts_while_it_discharges(unplugged: Path, current: int) -> None:
    put(unplugged, f"{BATTERY}/current_now", current)
    sensor = power.find(unplugged)
    assert sensor and sensor.source == "fuel_gauge: BAT0"
    assert power.read(sensor) == (pytest.approx(15.6 * 0.5),)
    put(unplugged, f"{BATTERY}/status", "Charging")
    assert power.read(sensor) is None
    assert power.find(unplugged) is None
    assert "charging" in power.why_not(unplugged)


def test_a_battery_on_a_weak_charger_is_no_sensor(unplugged: Path) -> None:
    put(unplugged, "sys/class/power_supply/AC/online", 1)  # still discharging
    assert power.find(unplugged) is None


def test_a_battery_that_tells_watts(unplugged: Path) -> None:
    (unplugged / BATTERY / "current_now").unlink()
    put(unplugged, f"{BATTERY}/power_now", 7100000)
    sensor = power.find(unplugged)
    assert sensor and power.read(sensor) == (pytest.approx(7.1),)


def test_two_batteries_are_no_sensor_but_a_mouse_is_no_battery(unplugged: Path) -> None:
    assert power.find(unplugged)  # hidpp_battery_0 is there
    shutil.copytree(unplugged / BATTERY, unplugged / "sys/class/power_supply/BAT1")
    assert power.find(unplugged) is None
    assert "several batteries" in power.why_not(unplugged)


def test_a_charger_plugged_in_during_the_burst_voids_the_energy(unplugged: Path) -> None:
    board = Board(unplugged / BATTERY / "voltage_now", 1.0, 1.0, unit=0.5e-6)  # at a constant half ampere
    sensor = power.find(unplugged)
    assert sensor
    body = board.burst(200, 0.03)

    def plugged() -> int:
        put(unplugged, f"{BATTERY}/status", "Charging")
        return body()

    assert board.measure(sensor, plugged) == (None, ("sensor_gaps",))
    put(unplugged, f"{BATTERY}/status", "Discharging")
    board = Board(unplugged / BATTERY / "voltage_now", 1.0, 1.0, unit=0.5e-6)
    energy, _ = board.measure(sensor, board.burst(200, 0.03))
    assert energy and energy.total_mj == pytest.approx(1e3 * BUSY * 0.03, rel=0.03)
