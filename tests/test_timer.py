"""The timer and the clock it reads: which turns count, what ends, and what is said of a function that runs over and over."""

import time

import torch

from sbkernels.bench import clock, timer


def test_the_timer_throws_slow_turns_out():
    class Slow:
        declared, readings = 1000, iter([1500, 900] * 100)

        def read(self):
            return next(self.readings)

    effort = timer.Effort(seconds=0, least=4, most=4)
    found = timer.measure({"a": lambda: None}, "cpu", effort=effort, clock=Slow(), canary=lambda: None)["a"]
    assert (found.dropped, len(found.samples), len(found.beside), found.clock) == (2, 2, 2, 1500)


def test_sustained(monkeypatch):
    """On a clock that is planted: calls of 10 ms that take 5 J each, at a clock that falls by 1 MHz whenever it is read."""
    now = [0.0]

    class Falling:
        readings = iter(range(1980, 0, -1))

        def read(self):
            return next(self.readings)

        def joules(self):
            return now[0] * 500

    def call():
        now[0] += 0.01

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    found = timer.sustained(call, "cpu", 0.2, Falling())
    assert abs(found.ms - 10) < 1e-6 and abs(found.watts - 500) < 1e-6
    assert abs(now[0] - 0.3) < 0.05 and 1960 < found.mhz < 1970, "what runs first does not count"
    assert str(found).startswith("10 ms, 196") and str(found).endswith("MHz, 500 W")
    found = timer.sustained(call, "cpu", 0.1)
    assert abs(found.ms - 10) < 1e-6 and found.mhz is None and found.watts is None and str(found) == "10 ms"


def test_host_times_of_slow_calls_end(monkeypatch):
    """A contender is called as often as all the others, or until its share of the time is up."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timer, "HOST_SECONDS", 0.05)
    monkeypatch.setattr(timer, "HOST_ROUNDS", 4)
    calls = {"fast": 0, "slow": 0}

    def call(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    found = timer.measure_host({"fast": lambda: call("fast", 0), "slow": lambda: call("slow", 0.01)}, "cuda:0")
    assert calls == {"fast": 4 * (1 + timer.HOST_CALLS), "slow": 1 + timer.HOST_CALLS}
    assert found["slow"] > 1e4 > found["fast"] > 0


def test_nvml_is_asked_for_the_clock(monkeypatch):
    """With a driver's library that is planted; the real one is asked in the same words."""

    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, _):
            return int(uuid.value != b"GPU-abc")

        def nvmlDeviceGetMaxClockInfo(self, _, kind, value):
            value._obj.value = 1980
            return 0

        def nvmlDeviceGetClockInfo(self, _, kind, value):
            value._obj.value = 1755
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, _, value):
            value._obj.value = 2500
            return 0

    monkeypatch.setattr(clock.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(clock.torch.cuda, "get_device_properties", lambda _: type("P", (), {"uuid": "abc"}))
    found, _ = clock.of("cuda:0", None)
    assert (found.read(), found.highest, found.declared) == (1755, 1980, 990)
    assert found.joules() == 2.5
    monkeypatch.setattr(Library, "nvmlDeviceGetTotalEnergyConsumption", lambda *_: 3)
    assert found.joules() is None
    monkeypatch.setattr(Library, "nvmlInit_v2", lambda self: 9)
    assert clock.of("cuda:0", None) == (None, "the SM clock is not read: NVML's nvmlInit_v2 gave status 9")
    assert clock.of("cpu", None)[0] is None
